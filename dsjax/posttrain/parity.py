"""The parity of a row of bits, answered at once or after a chain of thought (after arXiv:2510.11495).

A prompt is `1011=`. The short form of its answer is the parity alone: `o`, odd, or `e`, even. The long form says each
bit and the parity so far before that, as one letter: a capital where the bit is 1, B or b where the parity so far is
odd. `BbABo`: the bit 1 and odd, 0 and odd, 1 and even, 1 and odd; and so the answer is odd. To say it at once, all bits
have to be brought together in one place; to go on with a chain takes the next bit and the letter before.
"""

import hashlib
import random

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
