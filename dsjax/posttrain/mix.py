"""Several tasks as one, by weight, as DeepSeek-R1's last stage has them: reasoning and all else.

open_task("reasoning.jsonl:0.7,parity:24:0.3") is a mix. Which task a problem is of follows from its number alone: the
one that is furthest behind its share, so that every few problems in a row have the shares that were asked for.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np

from dsjax.config import ConfigError, show
from dsjax.posttrain.problem import Opened, Problem

FACT = "task"  # of a mix's problems: the number of the task that they are of
_NEXT = re.compile(r",(?=gym:|parity:|[^,]*\.jsonl(?::[^,]*)?(?:,|$))")  # what divides: a gym's options have commas too
_WEIGHTED = re.compile(r"(gym:.+|parity:\d+|.+\.jsonl):([^:/]*)")


def parts(spec: str) -> list[tuple[str, float]]:
    """The tasks of a mix by what they are called, with their weights; one alone, as it is, for what is no mix.

    Raises ConfigError for a weight that is none.
    """
    names = _NEXT.split(spec)
    if len(names) == 1:
        return [(spec, 1.0)]
    return [_weighted(name.strip()) for name in names]


def _weighted(name: str) -> tuple[str, float]:
    found = _WEIGHTED.fullmatch(name)
    if found is None:
        return name, 1.0
    try:
        weight = float(found[2])
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf"):
        raise ConfigError(f"task={show(name)}: expected a weight greater than 0 behind the last colon, as in :0.5")
    return found[1], weight


class TaskMix(Opened):
    """Tasks drawn from by weight. A part of the reward has one weight, whichever tasks have it: that of `weights`, or
    the tasks' own.

    Raises ConfigError for a part that two tasks weigh differently, or that has no weight.
    """

    def __init__(self, tasks: Sequence[Any], shares: Sequence[float], weights: Mapping[str, float] | None = None):
        self.tasks, self.shares = list(tasks), np.array(shares, float) / sum(shares)
        self.name = ", ".join(task.name for task in tasks)
        self.weights: dict[str, float] = dict(weights or {})
        for task in tasks:
            for part, weight in task.weights.items():
                if weights is not None and part not in weights:
                    raise ConfigError(f"rewards: expected {part} among them, for {task.name}")
                if weights is None and self.weights.setdefault(part, weight) != weight:
                    raise ConfigError(
                        f"rewards: {part}:{weight:g} of {task.name}, and {self.weights[part]:g} of a task before it; "
                        "expected one weight in all tasks of a mix"
                    )
        self._which: list[tuple[int, int]] = []  # of each problem: the task, and its number there
        self._taken = np.zeros(len(self.tasks), int)

    def close(self) -> None:
        with ExitStack() as stack:
            for task in self.tasks:
                stack.callback(getattr(task, "close", lambda: None))

    def problem(self, index: int) -> Problem:
        while len(self._which) <= index:
            behind = self.shares * (len(self._which) + 1) - self._taken
            which = int(np.argmax(behind))
            self._which.append((which, int(self._taken[which])))
            self._taken[which] += 1
        which, number = self._which[index]
        return _of(which, self.tasks[which].problem(number))

    def heldout(self) -> list[Problem]:
        """Those of all tasks; the first n of them have the shares of the mix, as long as there are some of each."""
        placed = [
            ((n + 0.5) / share, which, problem)
            for which, (task, share) in enumerate(zip(self.tasks, self.shares))
            for n, problem in enumerate(task.heldout())
        ]
        return [_of(which, problem) for _, which, problem in sorted(placed, key=lambda one: one[:2])]

    def judge(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Mapping[str, float]]:
        judged: list[Mapping[str, float]] = [{} for _ in problems]
        for which, task in enumerate(self.tasks):
            mine = [i for i, problem in enumerate(problems) if problem.facts[FACT] == which]
            if mine:
                found = task.judge([problems[i] for i in mine], [texts[i] for i in mine])
                for i, of in zip(mine, found, strict=True):
                    judged[i] = of
        return judged

    def answer(self, problem: Problem, text: str) -> str | None:
        """As the problem's task finds it."""
        task = self.tasks[problem.facts[FACT]]
        return task.answer(problem, text) if hasattr(task, "answer") else None


def _of(which: int, problem: Problem) -> Problem:
    return replace(problem, facts={**problem.facts, FACT: which})
