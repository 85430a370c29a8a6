"""Which source the i-th row comes from: a function of i and the weights alone, as even as whole numbers allow."""

from collections.abc import Sequence
from fractions import Fraction


class Mixture:
    """Shares a sequence of rows out among sources by weight.

    Among the first n rows each source has its exact share, rounded, with an error below len(weights) / 2; so it has of
    any stretch, and no batch waits for its share. The first source against the rest by rounding, then the second ...
    """

    def __init__(self, weights: Sequence[float | Fraction]):
        exact = [Fraction(w).limit_denominator(10**9) if isinstance(w, float) else Fraction(w) for w in weights]
        self.order = sorted(range(len(exact)), key=lambda k: -exact[k])
        # Each against all that come after it, as numerator and denominator: whole numbers, exact at any row.
        shares = [exact[k] / sum(exact[k] for k in self.order[place:]) for place, k in enumerate(self.order)]
        self.shares = [(share.numerator, share.denominator) for share in shares]

    def __getitem__(self, row: int) -> tuple[int, int]:
        """(source, row within that source) of a row."""
        for source, (w, total) in zip(self.order, self.shares):
            before, after = ((2 * n * w + total) // (2 * total) for n in (row, row + 1))
            if after > before:
                return source, before
            row -= before
        raise AssertionError("the last source takes all that is left")

    def counts(self, rows: int) -> list[int]:
        """How many of the first `rows` rows each source has."""
        counts = [0] * len(self.order)
        for source, (w, total) in zip(self.order, self.shares):
            counts[source] = (2 * rows * w + total) // (2 * total)
            rows -= counts[source]
        return counts
