"""Texts judged by several rewards at once, in threads: `Judging`. Weights as a user types them: `read_weights`."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from dsjax.config import ConfigError, nearest, show
from dsjax.posttrain.problem import Problem
from dsjax.posttrain.rewards import REWARDS

_THREADS = 8  # texts judged at once


class Judging:
    """The parts of a reward by name, opened here and closed by `close`, or at the end of a context.

    Raises ConfigError for a part that cannot be had: code without a sandbox, or a package that is missing.
    """

    def __init__(self, names: Iterable[str]):
        with ExitStack() as stack:
            self._judges = {name: stack.enter_context(REWARDS[name].open()) for name in names}
            self._pool = ThreadPoolExecutor(_THREADS)
            stack.callback(self._pool.shutdown, cancel_futures=True)  # before what they ask is closed
            self._stack = stack.pop_all()

    def judge(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[dict[str, float]]:
        """Each text's reward by part; of a problem with facts["rewards"], by those of them alone."""
        waiting = [
            {name: self._pool.submit(self._judges[name], problem, text) for name in _parts(problem, self._judges)}
            for problem, text in zip(problems, texts, strict=True)
        ]
        return [{name: part.result() for name, part in parts.items()} for parts in waiting]

    def close(self) -> None:
        self._stack.close()


def lack(problem: Problem, names: Collection[str]) -> str | None:
    """What a problem does not have to be judged by these parts; None if nothing."""
    parts = _parts(problem, names)
    if not isinstance(parts, list | tuple) or not all(isinstance(name, str) for name in parts):
        return f"rewards={show(parts)}: expected a list of names"
    if unknown := [name for name in parts if name not in names]:
        return f"rewards={show(unknown[0])}: expected names of the task's rewards, {', '.join(names)}"
    return next(filter(None, (REWARDS[name].lacks(problem) for name in parts)), None)


def _parts(problem: Problem, names: Collection[str]):
    return problem.facts.get("rewards", list(names))


def read_weights(given: str | Mapping[str, float], known: Iterable[str] = tuple(REWARDS)) -> dict[str, float]:
    """{"accuracy": 1.0, "format": 0.5} of `accuracy:1,format:0.5`; a name alone weighs 1. Raises ConfigError."""
    known, weights = list(known), {}
    pairs = given.items() if isinstance(given, Mapping) else (part.partition(":")[::2] for part in given.split(","))
    for name, value in pairs:
        name = name.strip()
        if name not in known:
            near = nearest(name, known)[0]
            raise ConfigError(f"rewards: {show(name)}: no such reward; the nearest is {near} of {', '.join(known)}")
        if name in weights:
            raise ConfigError(f"rewards: {name}: given twice")
        try:
            weights[name] = 1.0 if value == "" else float(value)
        except (TypeError, ValueError):
            weights[name] = math.nan
        if not math.isfinite(weights[name]):
            raise ConfigError(f"rewards: {name}:{show(value)}: expected a number, as in {name}:0.5")
    if not weights:
        raise ConfigError(f"rewards: expected at least one of {', '.join(known)}")
    return weights
