"""Both packers keep every transition once; rows come out with the right segments and positions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.data.packing import FITTERS, PACKERS, best_fit, best_fit_into, concat, render

LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=30).map(np.array)
ROW = st.integers(2, 24)
packers = pytest.mark.parametrize("pack", PACKERS.values(), ids=PACKERS)


def transitions(plan) -> list[tuple[int, int]]:
    """(document, token) for each token that is followed by the next one of its document in a row."""
    pieces = zip(plan.document.tolist(), plan.start.tolist(), plan.length.tolist())
    return sorted((document, start + i) for document, start, length in pieces for i in range(length - 1))


@packers
@given(lengths=LENGTHS, seq_len=ROW)
@settings(deadline=None)
def test_every_transition_is_in_exactly_one_row(pack, lengths, seq_len):
    wanted = sorted((d, i) for d, length in enumerate(lengths) for i in range(length - 1))
    assert transitions(pack(lengths, seq_len)) == wanted


@packers
@given(lengths=LENGTHS, seq_len=ROW)
@settings(deadline=None)
def test_every_row_is_used_and_none_is_too_full(pack, lengths, seq_len):
    plan = pack(lengths, seq_len)
    room = np.bincount(plan.row, plan.length, plan.n_rows)
    assert np.all(np.diff(plan.row) >= 0)
    assert len(room) == plan.n_rows and room.min() >= 1 and room.max() <= seq_len
    assert plan.length.min() >= 1


@given(lengths=LENGTHS, seq_len=ROW)
@settings(deadline=None)
def test_concat_rows_are_slices_of_one_stream_that_overlap_by_one(lengths, seq_len):
    stream = np.concatenate([1000 * d + np.arange(length) for d, length in enumerate(lengths)])
    plan = concat(lengths, seq_len)
    for row in range(plan.n_rows):
        tokens = np.concatenate([1000 * d + start + np.arange(length) for d, start, length in plan.pieces(row)])
        np.testing.assert_array_equal(tokens, stream[row * (seq_len - 1) :][:seq_len])


@given(lengths=LENGTHS, seq_len=ROW)
@settings(deadline=None)
def test_best_fit_keeps_documents_whole_and_leaves_no_piece_of_one_token(lengths, seq_len):
    plan = best_fit(lengths, seq_len)
    pieces = np.bincount(plan.document, minlength=len(lengths))
    np.testing.assert_array_equal(pieces, np.where(lengths <= seq_len, 1, -(-(lengths - 1) // (seq_len - 1))))
    assert plan.length.min() >= 2


@given(lengths=LENGTHS, seq_len=ROW)
@settings(deadline=None)
def test_best_fit_opens_a_row_only_when_it_must(lengths, seq_len):
    """Two rows at most half full would have been one."""
    plan = best_fit(lengths, seq_len)
    assert (2 * np.bincount(plan.row, plan.length) <= seq_len).sum() <= 1


@given(sizes=st.lists(st.integers(1, 9), max_size=5))
def test_rendered_segments_and_positions_follow_the_pieces(sizes):
    row = render([np.full(n, 7) for n in sizes], 48, pad_id=2)
    used = sum(sizes)
    assert row["segment_ids"].tolist() == [s for s, n in enumerate(sizes, 1) for _ in range(n)] + [0] * (48 - used)
    assert row["positions"].tolist() == [i for n in sizes for i in range(n)] + [0] * (48 - used)
    assert row["tokens"].tolist() == [7] * used + [2] * (48 - used)
    assert all(a.dtype == np.int32 and a.shape == (48,) for a in row.values())


@pytest.mark.parametrize("fit", FITTERS.values(), ids=FITTERS)
@given(lengths=LENGTHS, seq_len=st.integers(4, 24), more=st.integers(0, 2))
@settings(deadline=None)
def test_a_given_number_of_rows_holds_every_transition_once(fit, lengths, seq_len, more):
    """As many rows as a stream needs are enough, however documents are packed; more of them are used too."""
    n_rows = max(-(-(int(lengths.sum()) - 1) // (seq_len - 1)), 1) + more
    plan = fit(lengths, seq_len, n_rows)
    assert plan.n_rows == n_rows
    assert transitions(plan) == sorted((d, i) for d, length in enumerate(lengths) for i in range(length - 1))
    used = np.bincount(plan.row, plan.length, n_rows)
    assert used.max() <= seq_len and np.all(np.diff(plan.row) >= 0)
    if lengths.sum() > 4 * n_rows:
        assert used.min() >= 1


@given(n=st.integers(20, 60), seed=st.integers(0, 20))
@settings(deadline=None, max_examples=20)
def test_few_documents_are_cut_where_all_could_stay_whole(n, seed):
    lengths = np.random.default_rng(seed).integers(2, 33, 20 * n)
    n_rows = -(-int(lengths.sum()) // 63) + 1
    plan = best_fit_into(lengths, 64, n_rows)
    assert (np.bincount(plan.document) > 1).sum() <= 2


@packers
def test_no_documents_make_no_rows(pack):
    assert pack(np.zeros(0, np.int64), 8).n_rows == 0
