"""A document with its special tokens, cut anywhere; FIM gives the middle back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsjax.data.documents import TokenizedDocuments, draw_epoch, slice_document, uniforms
from dsjax.data.tokenizer import bytes_tokenizer

TOKENIZER = bytes_tokenizer()
LENGTHS = st.lists(st.integers(0, 30), min_size=1, max_size=20)


def documents(lengths, weights=None) -> TokenizedDocuments:
    tokens = np.concatenate([6 + (np.arange(n) + 37 * d) % 256 for d, n in enumerate(lengths)]).astype(np.int32)
    return TokenizedDocuments(tokens, np.array(lengths), np.array(weights or [1.0] * len(lengths)))


def undo_fim(tokens: list[int]) -> list[int]:
    """The document's own tokens from its PSM form, by its special tokens alone."""
    begin, hole, end = (tokens.index(id) for id in TOKENIZER.fim_ids)
    return tokens[begin + 1 : hole] + tokens[end + 1 : -1] + tokens[hole + 1 : end]


@given(lengths=LENGTHS, seed=st.integers(0, 5), epoch=st.integers(0, 5))
def test_the_middle_comes_back(lengths, seed, epoch):
    docs = documents(lengths)
    drawn = draw_epoch(docs, 1.0, seed, epoch)
    for document, cuts, length in zip(drawn.document, drawn.cuts, drawn.lengths):
        tokens = slice_document(docs[document], cuts, TOKENIZER, 0, length).tolist()
        assert len(tokens) == length and tokens[0] == TOKENIZER.bos_id and tokens[-1] == TOKENIZER.eos_id
        assert undo_fim(tokens) == docs[document].tolist()


@given(n=st.integers(0, 30), a=st.integers(0, 30), b=st.integers(0, 30), start=st.integers(0, 40), fim=st.booleans())
def test_a_slice_of_a_document_is_a_slice_of_the_whole(n, a, b, start, fim):
    tokens = np.arange(6, 6 + n)
    cuts = sorted((min(a, n), min(b, n))) if fim else (-1, -1)
    whole = slice_document(tokens, cuts, TOKENIZER, 0, 1000)
    part = slice_document(tokens, cuts, TOKENIZER, start, 7)
    assert whole.dtype == np.int32 and len(whole) == n + (5 if fim else 2)
    np.testing.assert_array_equal(part, whole[start : start + 7])


def test_fim_takes_its_rate_of_the_documents_and_others_in_each_epoch():
    docs = documents([5] * 2000)
    chosen = [draw_epoch(docs, 0.1, 0, epoch) for epoch in (0, 1)]
    marked = [set(e.document[e.cuts[:, 0] >= 0].tolist()) for e in chosen]
    assert all(150 < len(m) < 250 for m in marked) and marked[0] != marked[1]
    assert not np.any(draw_epoch(docs, 0.0, 0, 0).cuts >= 0)


def test_cuts_fall_on_every_place_of_a_document():
    cuts = draw_epoch(documents([3] * 2000), 1.0, 0, 0).cuts
    assert {tuple(c) for c in cuts.tolist()} == {(a, b) for a in range(4) for b in range(a, 4)}


def test_an_epoch_has_each_document_once_in_an_order_of_its_own():
    docs = documents([3] * 50)
    first, again, second = (draw_epoch(docs, 0.0, 0, epoch).document for epoch in (0, 0, 1))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(50))
    assert first.tolist() == again.tolist() != second.tolist()


def test_weights_are_copies_an_epoch_on_average():
    docs = documents([3] * 400, [1.0] * 100 + [2.0] * 100 + [0.5] * 100 + [1.5] * 100)
    counts = [np.bincount(draw_epoch(docs, 0.0, 0, e).document, minlength=400).reshape(4, 100) for e in range(20)]
    assert all((c[0] == 1).all() and (c[1] == 2).all() and c[2].max() == 1 and c[3].min() == 1 for c in counts)
    assert np.mean(counts, axis=(0, 2)) == pytest.approx([1, 2, 0.5, 1.5], abs=0.06)


def test_draws_are_the_same_on_every_machine():
    assert uniforms(3, 0, 0, 1).tolist() == uniforms(5, 0, 0, 1)[:3].tolist()
    assert uniforms(2, 1, 2, 3).tolist() == [0.6704722626516632, 0.1110146366693816]
