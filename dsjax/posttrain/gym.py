"""reasoning-gym's data sets as tasks: open_task("gym:chain_sum?max_terms=4").

Problems are made by the package from a seed and a number; answers are judged by its data sets.
"""

import ast
import dataclasses
import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from dsjax.config import ConfigError, nearest, show
from dsjax.posttrain.judging import Judging, lack, read_weights
from dsjax.posttrain.problem import Opened, Problem
from dsjax.posttrain.rewards.answer import given_answer
from dsjax.posttrain.rewards.gym import check, make_dataset

_N_HELDOUT = 128
_A_SEED = 1000  # problems taken of one seed of the package: some of its data sets have no more than they were made for
_TRIES = 64
# Their problems follow the order of a set of texts, which is another one in each process (of version 0.1.25).
_HASHED = ("isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder")


class Gym(Opened):
    """A data set of reasoning-gym. A problem to learn from is a function of seed and index.

    Held-out problems are made from a seed of their own; one to learn from that has the same question is replaced by
    the next that has not.
    """

    def __init__(self, dataset: str, options: Mapping[str, Any], weights: Mapping[str, float], seed: int = 0):
        check()
        _check_options(dataset, options)
        if dataset in _HASHED and os.environ.get("PYTHONHASHSEED", "random") == "random":
            raise ConfigError(f"gym:{dataset}: expected PYTHONHASHSEED=0 in the environment, which its problems follow")
        self.dataset, self.options, self.seed, self.weights = dataset, dict(options), seed, dict(weights)
        self.name = f"gym:{dataset}"
        self._make = functools.lru_cache(4)(self._make)
        if missing := lack(self.heldout()[0], weights):
            raise ConfigError(f"gym:{dataset}: {missing}")
        self._judging = Judging(weights)

    def close(self) -> None:
        self._judging.close()

    def problem(self, index: int) -> Problem:
        epoch, number = divmod(index, _A_SEED)
        for attempt in range(_TRIES):
            problem = self._problem(f"{self.seed} {epoch} {attempt}", number)
            if problem.prompt not in self._heldout[1]:
                return problem
        raise ConfigError(
            f"gym:{self.dataset}: problem {index}: held out, and so were {_TRIES - 1} in its place; expected options "
            "that allow more problems"
        )

    def heldout(self) -> list[Problem]:
        return list(self._heldout[0])

    def judge(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[dict[str, float]]:
        return self._judging.judge(problems, texts)

    def answer(self, problem: Problem, text: str) -> str | None:
        """What is scored."""
        return given_answer(text)

    @functools.cached_property
    def _heldout(self) -> tuple[list[Problem], set[str]]:
        problems = {p.prompt: p for p in (self._problem("held out", n) for n in range(_N_HELDOUT))}
        return list(problems.values()), set(problems)

    def _make(self, seed: str):
        number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4], "big")
        return make_dataset(self.dataset, {"size": _A_SEED, **self.options, "seed": number})

    def _problem(self, seed: str, number: int) -> Problem:
        entry = self._make(seed)[number]
        facts = {"gym": (self.dataset, self.options), "entry": entry, "language": "en"}
        answer = entry["answer"]
        return Problem(entry["question"], answer if isinstance(answer, str) else "", facts)


def open_gym(rest: str, weights: str | Mapping[str, float] | None, seed: int) -> Gym:
    """The task of "chain_sum?max_terms=4" in gym:chain_sum?max_terms=4. Raises ConfigError."""
    name, _, query = rest.partition("?")
    options = {}
    for part in filter(None, query.split("&")):
        key, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"gym:{name}: {show(part)}: expected an option as in max_terms=4")
        options[key] = _value(value)
    return Gym(name, options, read_weights("gym" if weights is None else weights), seed)


def _value(text: str) -> Any:
    """A number, a truth value, a list; else the text."""
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text, text))
    except (ValueError, SyntaxError):
        return text


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        raise ConfigError(
            f"gym:{show(name, quote=False)}: no such data set; the nearest is gym:{nearest(name, DATASETS)[0]}"
        )
    known = [field.name for field in dataclasses.fields(DATASETS[name][1]) if field.name not in ("seed", "size")]
    for key in options:
        if key not in known:
            raise ConfigError(f"gym:{name}: {show(key)}: no such option; the nearest is {nearest(key, known)[0]}")
    try:
        make_dataset(name, {**options, "seed": 0})
    except Exception as error:  # each data set checks its options as it likes
        raise ConfigError(f"gym:{name}: {show(options, quote=False)}: {show(str(error), quote=False)}") from None
