"""What a model is asked in post-training, and how its answers are judged.

A task is a source of problems and a table of rewards by weight. `open_task` finds one by what a user types: a file
(`problems.jsonl`), or a name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class Problem:
    """A prompt, and what its answer is judged by."""

    prompt: str | tuple[Mapping[str, Any], ...]  # a text to continue, or messages for the chat template
    answer: str = ""  # what is expected
    facts: Mapping[str, Any] = field(default_factory=dict)  # what else a reward asks for: a program's tests, a language


@runtime_checkable
class Task(Protocol):
    """Problems without end to learn from, some that are held out, and what an answer is worth."""

    name: str
    weights: Mapping[str, float]  # of each part of the reward

    def problem(self, index: int) -> Problem:
        """The index-th problem to learn from: a pure function of it, and of the task."""

    def heldout(self) -> list[Problem]:
        """Problems that none of those to learn from is."""

    def judge(self, problems: list[Problem], texts: list[str]) -> list[dict[str, float]]:
        """Each text's reward by part, before weights; the texts are what the model said behind the prompts."""


def total(parts: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The sum of the parts by weight."""
    return sum(weights[name] * value for name, value in parts.items())
