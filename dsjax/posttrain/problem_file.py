"""A .jsonl file as a task: a problem a line, with `prompt` or `messages`, `answer`, and what else its rewards need.

{"prompt": "1 + 1 =", "answer": "2", "language": "en"}
{"messages": [{"role": "user", "content": "..."}], "tests": [["1 2\\n", "3\\n"]], "rewards": ["code"]}
"""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsjax.config import ConfigError, show
from dsjax.posttrain.judging import Judging, lack, read_weights
from dsjax.posttrain.problem import Opened, Problem
from dsjax.posttrain.rewards.answer import given_answer
from dsjax.posttrain.rewards.choice import chosen_letter

_HELDOUT = 8  # of 256 problems


class ProblemFile(Opened):
    """The problems of a file: each once an epoch, in an order that is a function of seed and epoch.

    heldout: a file of problems to measure with; those to learn from are the others. The same file: all of them are to
    measure with. None: about one in 32 of the file, by a hash of its prompt.
    """

    def __init__(self, path: Path, weights: str | Mapping[str, float] | None, seed: int, heldout: Path | None):
        problems = _read(path)
        held = None if heldout is None else _read(heldout)
        self.name, self.seed = path.stem, seed
        if weights is None:  # what the lines name, or accuracy
            _check_all_or_none([*problems, *(held or ())])
            named = [n for _, p in problems if isinstance(p.facts.get("rewards"), list) for n in p.facts["rewards"]]
            weights = dict.fromkeys(filter(lambda name: isinstance(name, str), named), 1.0) or "accuracy"
        self.weights = read_weights(weights)
        for where, problem in (*problems, *(held or ())):
            if missing := lack(problem, self.weights):
                raise ConfigError(f"{where}: {missing}")
        if held is None:
            held = [(where, problem) for where, problem in problems if _hash(problem)[0] < _HELDOUT]
        apart = {_hash(problem) for _, problem in held}
        self._problems = [problem for _, problem in problems if _hash(problem) not in apart]
        self._heldout = [problem for _, problem in held]
        self._order = functools.lru_cache(2)(self._order)
        used = {name for _, problem in (*problems, *held) for name in problem.facts.get("rewards", self.weights)}
        self._judging = Judging(name for name in self.weights if name in used)

    def close(self) -> None:
        self._judging.close()

    def problem(self, index: int) -> Problem:
        if not self._problems:
            raise ConfigError(f"{self.name}: no problem to learn from, for all are held out")
        epoch, at = divmod(index, len(self._problems))
        return self._problems[self._order(epoch)[at]]

    def heldout(self) -> list[Problem]:
        return list(self._heldout)

    def judge(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[dict[str, float]]:
        return self._judging.judge(problems, texts)

    def answer(self, problem: Problem, text: str) -> str | None:
        r"""For choice the letter that the text settles on, for accuracy the last \boxed{} or else the last <answer>."""
        judged_by = problem.facts.get("rewards", self.weights)
        if "choice" in judged_by:
            return chosen_letter(text)
        return given_answer(text) if "accuracy" in judged_by else None

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self._problems))


def _check_all_or_none(problems: Sequence[tuple[str, Problem]]) -> None:
    """Raises ConfigError where some lines name their rewards and others do not: nothing says what these would be."""
    names = next((where for where, problem in problems if "rewards" in problem.facts), None)
    lacks = next((where for where, problem in problems if "rewards" not in problem.facts), None)
    if names is not None and lacks is not None:
        raise ConfigError(f"{lacks}: rewards: expected, for {names} names its own; or weights for all")


def _hash(problem: Problem) -> bytes:
    return hashlib.sha256(json.dumps(problem.prompt, sort_keys=True).encode()).digest()


def _read(path: Path) -> list[tuple[str, Problem]]:
    """Each problem with its place. Raises ConfigError, with its line, for one that is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: {error}") from None
    problems = []
    for n, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}: line {n}"
            try:
                problems.append((where, _problem(json.loads(line))))
            except ConfigError as error:
                raise ConfigError(f"{where}: {error}") from None
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{where}: not JSON: {show(str(error), quote=False)}") from None
    if not problems:
        raise ConfigError(f"{path}: expected a problem a line, and it has none")
    return problems


def _problem(record: Any) -> Problem:
    if not isinstance(record, dict) or ("prompt" in record) == ("messages" in record):
        raise ConfigError(f"{show(record)}: expected an object with prompt or with messages")
    facts = dict(record)
    prompt, answer = facts.pop("prompt", None), facts.pop("answer", "")
    if "messages" in facts:
        messages = facts.pop("messages")
        good = isinstance(messages, list) and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages
        )
        if not good or not messages:
            raise ConfigError(f'messages={show(messages)}: expected a list of {{"role": ..., "content": ...}}')
        prompt = tuple(messages)
    elif not isinstance(prompt, str) or not prompt:
        raise ConfigError(f"prompt={show(prompt)}: expected a text")
    if not isinstance(answer, str | int | float) or isinstance(answer, bool):
        raise ConfigError(f"answer={show(answer)}: expected a text or a number")
    return Problem(prompt, str(answer), facts)
