"""Reward for the right answer of a problem in mathematics.

The answer is cut out here; then it is compared as a text and as a number, and only then as an expression, by
math-verify in worker processes that are killed when their time is over: an expression may be made to take for ever.
"""

import importlib.util
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

from dsjax.config import ConfigError
from dsjax.posttrain.problem import Judge, Problem, Reward
from dsjax.posttrain.rewards.answer import LONGEST, given_answer, number, plain
from dsjax.posttrain.rewards.workers import Workers

_WORD = re.compile(r"[^\W\d_]{3,}")


def accuracy_reward(text: str, expected: str, same: Callable[[str, str], bool]) -> float:
    r"""1 if the last \boxed{} behind the thinking, or else the last <answer>, is what was expected, else 0.

    same: whether two answers that differ as texts, and are not both numbers, are equal (`Judges.same`).
    """
    answer = given_answer(text)
    if not answer:
        return 0.0
    one, other = plain(answer), plain(expected)
    if one == other:
        return 1.0
    values = number(one), number(other)
    if None not in values:
        return float(values[0] == values[1] or _percents(one, other))
    if one.lower() == other.lower() or (_WORD.fullmatch(one) and _WORD.fullmatch(other)):
        return 0.0  # math-verify is blind to case, and reads a word as a product of its letters: Paris is Pairs
    if max(len(answer), len(expected)) > LONGEST:
        return 0.0
    return float(same(expected, answer))


def _percents(one: str, other: str) -> bool:
    """Whether one of two numbers leaves out the sign of its percents: 50% and 50."""
    return one.endswith("%") != other.endswith("%") and number(one.rstrip("%")) == number(other.rstrip("%"))


class Judges(Workers):
    """math-verify in n processes. To be used as a context; `same` may be called from several threads.

    A comparison that takes longer than seconds, or more memory than a worker may have, counts as not equal; its worker
    is killed, and another one begins.
    """

    def __init__(self, n: int = 2, seconds: float = 5.0):
        super().__init__(_work, n, seconds)

    def same(self, expected: str, answer: str) -> bool:
        """Whether two answers in LaTeX or plain notation are one. Waits for a worker that is idle."""
        return self.ask("\0".join((expected, answer)).encode("utf-8", "replace")) == b"1"


def _work(pipe: Connection) -> None:
    import logging

    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    pipe.send_bytes(b"ready")
    while True:
        try:
            expected, answer = pipe.recv_bytes().decode().split("\0")[:2]
        except EOFError:
            return
        sides = [parse(f"${side}$", parsing_timeout=None, raise_on_error=False) for side in (expected, answer)]
        equal = all(sides) and verify(*sides, timeout_seconds=None, raise_on_error=False)
        pipe.send_bytes(b"1" if equal else b"0")


@contextmanager
def _open() -> Iterator[Judge]:
    if importlib.util.find_spec("math_verify") is None:
        raise ConfigError("rewards: accuracy needs math-verify, which is not here: pip install 'dsjax[posttrain]'")
    with Judges() as judges:
        yield lambda problem, text: accuracy_reward(text, problem.answer, judges.same)


def _lacks(problem: Problem) -> str | None:
    return None if problem.answer.strip() else "answer: expected a text, for the reward accuracy"


REWARD = Reward(_open, _lacks)
