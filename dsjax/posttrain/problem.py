"""A problem, and what judges one part of its reward. The parts by name are in `rewards`, the problems in `tasks`."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Problem:
    """A prompt, and what its answer is judged by."""

    prompt: str | tuple[Mapping[str, Any], ...]  # a text to continue, or messages for the chat template
    answer: str = ""  # what is expected
    facts: Mapping[str, Any] = field(default_factory=dict)  # what else a reward asks for: a program's tests, a language


class Opened:
    """A task as a context, which `close` ends."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """It holds nothing, unless it says otherwise."""


Judge = Callable[[Problem, str], float]  # what a text is worth; called from several threads


class Reward(NamedTuple):
    """One part of a reward: an entry of `rewards.REWARDS`."""

    open: Callable[[], AbstractContextManager[Judge]]  # with what it holds: processes. ConfigError where it cannot be
    lacks: Callable[[Problem], str | None]  # what a problem does not have for it: "answer: expected a text"
