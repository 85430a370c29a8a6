"""A task that is easy with steps written out and hard without: is the number of ones among d bits odd?

open_task("parity:24"): the prompt is "0110...=", the answer the one bit behind the last "#" of the text.
"""

import hashlib
import random
from collections.abc import Sequence
from itertools import accumulate
from operator import xor

from dsjax.config import ConfigError, show
from dsjax.posttrain.problem import Problem

_HELDOUT = 8  # of 256 strings of bits
_N_HELDOUT = 256  # problems to measure with
_ALL = 16  # bits up to which all strings are looked at for held-out ones


def parity_chain(bits: str) -> str:
    """The solution with its steps: the parity of the first bit, of the first two, ... of all, "#", and it again."""
    steps = "".join(str(p) for p in accumulate(map(int, bits), xor))
    return f"{steps}#{steps[-1]}"


def parity_short(bits: str) -> str:
    """The solution without steps."""
    return f"#{bits.count('1') % 2}"


def is_heldout(bits: str) -> bool:
    """Whether these bits are for measuring, whatever the seed."""
    return hashlib.sha256(bits.encode()).digest()[0] < _HELDOUT


class Parity:
    """The parity of n_bits random bits. A problem to learn from is a function of seed and index."""

    def __init__(self, n_bits: int, seed: int = 0):
        if not 8 <= n_bits <= 4096:
            raise ConfigError(f"parity:{n_bits}: expected 8 to 4096 bits")
        self.n_bits, self.seed = n_bits, seed
        self.name, self.weights = f"parity:{n_bits}", {"accuracy": 1.0}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """It holds nothing."""

    def problem(self, index: int) -> Problem:
        draw = random.Random(f"parity {self.n_bits} {self.seed} {index}")
        while is_heldout(bits := _bits(draw, self.n_bits)):
            pass
        return _problem(bits)

    def heldout(self) -> list[Problem]:
        draw = random.Random(f"parity {self.n_bits} held out")
        if self.n_bits <= _ALL:
            found = [bits for n in range(2**self.n_bits) if is_heldout(bits := f"{n:0{self.n_bits}b}")]
            draw.shuffle(found)
            return [_problem(bits) for bits in found[:_N_HELDOUT]]
        held: dict[str, None] = {}  # in the order they came
        while len(held) < _N_HELDOUT:
            if is_heldout(bits := _bits(draw, self.n_bits)):
                held[bits] = None
        return [_problem(bits) for bits in held]

    def judge(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[dict[str, float]]:
        return [{"accuracy": self.accuracy(problem, text)} for problem, text in zip(problems, texts, strict=True)]

    def answer(self, text: str) -> str | None:
        """What stands behind the last "#"; None without one."""
        _, mark, answer = text.rpartition("#")
        return answer.strip() if mark else None

    def accuracy(self, problem: Problem, text: str) -> float:
        """1 if the text's answer is the parity, else 0."""
        return float(self.answer(text) == problem.answer)


def open_parity(rest: str, seed: int) -> Parity:
    """The task of "24" in parity:24. Raises ConfigError."""
    if not rest.isdecimal() or len(rest) > 4:
        raise ConfigError(f"parity:{show(rest, quote=False)}: expected a number of bits, as in parity:24")
    return Parity(int(rest), seed)


def _bits(draw: random.Random, n: int) -> str:
    return f"{draw.getrandbits(n):0{n}b}"


def _problem(bits: str) -> Problem:
    return Problem(f"{bits}=", parity_short(bits)[1:])
