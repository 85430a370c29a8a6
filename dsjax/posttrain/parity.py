"""The parity of a row of bits, answered at once or after a chain of thought (after arXiv:2510.11495).

open_task("parity:24") is this task with 24 bits. A prompt is `1011=`. The short form of its answer is the parity alone:
`o`, odd, or `e`, even. The long form first says each bit with the parity of the bits up to it, as one letter: a capital
where the bit is 1, B or b where the parity is odd. `BbABo`: 1 and odd, 0 and odd, 1 and even, 1 and odd; so the answer
is odd. To say it at once, all bits have to be brought together in one place; a chain goes on from the letter before and
the next bit.
"""

import hashlib
import random
from collections.abc import Sequence

from dsjax.config import ConfigError, show
from dsjax.posttrain.problem import Opened, Problem

_N_HELDOUT = 256  # problems to measure with
_ALL = 16  # bits up to which all strings are looked at for held-out ones
LETTERS = {("0", 0): "a", ("0", 1): "b", ("1", 0): "A", ("1", 1): "B"}  # bit, parity of the bits up to it
ANSWERS = "eo"  # and not the prompts' 0 and 1, which nobody can foresee: that noise keeps answers from being sure


def parity(bits: str) -> str:
    """e or o: the number of ones is even or odd."""
    return ANSWERS[bits.count("1") % 2]


def parity_prompt(bits: str) -> str:
    return f"{bits}="


def parity_short(bits: str) -> str:
    """The answer alone."""
    return parity(bits)


def parity_chain(bits: str) -> str:
    """The chain of thought, and the answer."""
    odd, letters = 0, []
    for bit in bits:
        odd ^= int(bit)
        letters.append(LETTERS[bit, odd])
    return "".join(letters) + parity(bits)


def parity_answer(text: str) -> str | None:
    """The answer that ends what was said, if there is none before; else None."""
    return text[-1] if text[-1:] and text[-1] in ANSWERS and not set(text[:-1]) & set(ANSWERS) else None


def is_heldout(bits: str) -> bool:
    """Whether bits are kept from all training: one row of 32 is."""
    return hashlib.sha256(bits.encode()).digest()[0] < 8


def draw_bits(draw: random.Random, n_bits: int, heldout: bool = False) -> str:
    """Random bits of those to learn from, or of those held out."""
    while True:
        bits = format(draw.getrandbits(n_bits), f"0{n_bits}b")
        if is_heldout(bits) == heldout:
            return bits


class Parity(Opened):
    """The parity of n_bits random bits. A problem to learn from is a function of seed and index."""

    def __init__(self, n_bits: int, seed: int = 0):
        if not 8 <= n_bits <= 4096:
            raise ConfigError(f"parity:{n_bits}: expected 8 to 4096 bits")
        self.n_bits, self.seed = n_bits, seed
        self.name, self.weights = f"parity:{n_bits}", {"accuracy": 1.0}

    def problem(self, index: int) -> Problem:
        return _problem(draw_bits(random.Random(f"parity {self.n_bits} {self.seed} {index}"), self.n_bits))

    def heldout(self) -> list[Problem]:
        draw = random.Random(f"parity {self.n_bits} held out")
        if self.n_bits <= _ALL:
            found = [bits for n in range(2**self.n_bits) if is_heldout(bits := f"{n:0{self.n_bits}b}")]
            draw.shuffle(found)
            return [_problem(bits) for bits in found[:_N_HELDOUT]]
        held: dict[str, None] = {}  # in the order they came
        while len(held) < _N_HELDOUT:
            held[draw_bits(draw, self.n_bits, heldout=True)] = None
        return [_problem(bits) for bits in held]

    def judge(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[dict[str, float]]:
        return [{"accuracy": self.accuracy(problem, text)} for problem, text in zip(problems, texts, strict=True)]

    def answer(self, problem: Problem, text: str) -> str | None:
        """As `parity_answer` finds it."""
        return parity_answer(text)

    def accuracy(self, problem: Problem, text: str) -> float:
        """1 if the text's answer is the parity, else 0."""
        return float(parity_answer(text) == problem.answer)


def open_parity(rest: str, seed: int) -> Parity:
    """The task of "24" in parity:24. Raises ConfigError."""
    if not rest.isdecimal() or len(rest) > 4:
        raise ConfigError(f"parity:{show(rest, quote=False)}: expected a number of bits, as in parity:24")
    return Parity(int(rest), seed)


def _problem(bits: str) -> Problem:
    return Problem(parity_prompt(bits), parity(bits))
