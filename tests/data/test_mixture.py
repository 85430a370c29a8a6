"""Shares by weight at every length, each row of each source once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.data.mixture import Mixture

WEIGHTS = st.lists(st.one_of(st.floats(0.01, 100), st.integers(1, 10**13)), min_size=1, max_size=6)


@given(weights=WEIGHTS, start=st.integers(0, 10**12), n=st.integers(1, 60))
@settings(deadline=None)
def test_each_source_gets_its_rows_in_order_and_none_twice(weights, start, n):
    mixture = Mixture(weights)
    counts = mixture.counts(start)
    for row in range(start, start + n):
        source, number = mixture[row]
        assert number == counts[source]
        counts[source] += 1
        assert sum(counts) == row + 1 and counts == mixture.counts(row + 1)


@given(weights=WEIGHTS, rows=st.integers(0, 10**7))
@settings(deadline=None)
def test_the_share_is_exact_to_a_few_rows(weights, rows):
    for weight, count in zip(weights, Mixture(weights).counts(rows)):
        assert abs(count - rows * weight / sum(weights)) <= len(weights) / 2 + 1e-3


def test_two_to_one():
    assert [Mixture([1, 2])[i][0] for i in range(6)] in ([1, 0, 1] * 2, [1, 1, 0] * 2, [0, 1, 1] * 2)
    assert Mixture([0.5]).counts(7) == [7]
    assert Mixture([1, 3]).counts(4 * 10**12) == pytest.approx([10**12, 3 * 10**12], abs=1)
