"""Text comes back from its tokens, whole and in a stream; special tokens are never spelled by a text."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models

from dsjax.config import ConfigError
from dsjax.data.tokenizer import FIM, SPECIALS, Tokenizer, bytes_tokenizer, check_vocabulary, train_bpe

TEXTS = ["def f(self):\n    return 'naïve' + \"日本\"\n\n\n        x = 12345\t# 🙂\n" * 20]
KINDS = {"bpe": train_bpe(TEXTS, 300), "bytes": bytes_tokenizer()}
kinds = pytest.mark.parametrize("tokenizer", KINDS.values(), ids=KINDS)


@kinds
@given(text=st.text(max_size=60) | st.lists(st.sampled_from([*SPECIALS, *TEXTS[0], "\r\n"]), max_size=20).map("".join))
@settings(deadline=None)
def test_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert "".join(tokenizer.decode_stream(ids)) == text


@kinds
@given(data=st.data())
@settings(deadline=None)
def test_a_stream_is_the_whole_in_pieces_for_any_tokens(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=40))
    assert "".join(tokenizer.decode_stream(iter(ids))) == tokenizer.decode(ids)


@kinds
def test_a_stream_never_shows_part_of_a_character(tokenizer):
    pieces = list(tokenizer.decode_stream(tokenizer.encode("a日本🙂é")))
    assert all("\ufffd" not in piece for piece in pieces) and len(pieces) > 3


@kinds
def test_a_text_that_spells_a_special_token_is_only_text(tokenizer):
    ids = tokenizer.encode(f"x {''.join(SPECIALS)} y")
    assert not set(ids) & set(range(len(SPECIALS)))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.fim_ids) == (0, 1, 2, (3, 4, 5))
    assert tokenizer.decode([0, 3, *tokenizer.encode("x"), 1]) == "x"
    assert tokenizer.decode([1], skip_special=False) == SPECIALS[1]


@kinds
def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        again = Tokenizer.load(path)
        assert again.kind == tokenizer.kind and again.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_training_is_deterministic_and_keeps_to_the_size():
    assert train_bpe(iter(TEXTS), 300).dumps() == KINDS["bpe"].dumps()
    assert KINDS["bpe"].vocab_size == 300


def test_bytes_are_ids_after_the_special_ones():
    tokenizer = KINDS["bytes"]
    assert tokenizer.vocab_size == 262 and tokenizer.encode("aé\n") == [6 + b for b in "aé\n".encode()]
    assert tokenizer.text.encode("aé\n").ids == tokenizer.encode("aé\n")


def test_words_keep_numbers_short_and_indentation_with_its_line_break():
    tokenizer = train_bpe(["if x):\n        y = 12345678\n" * 50], 400)
    pieces = [tokenizer.decode([id]) for id in tokenizer.encode("x):\n        y = 12345678")]
    assert pieces == ["x", "):\n        ", "y", " = ", "123", "456", "78"]


def other_tokenizer(path, added: list[str], special: bool = True):
    backend = Backend(models.BPE({letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz<>|_/ ")}, []))
    (backend.add_special_tokens if special else backend.add_tokens)(added)
    backend.save(str(path))
    return path


def test_an_existing_tokenizer_is_read_by_common_names(tmp_path):
    tokenizer = Tokenizer.load(other_tokenizer(tmp_path / "t.json", ["<s>", "</s>"]))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (32, 33, 33)
    assert tokenizer.fim_ids is None and tokenizer.vocab_size == 34
    assert 33 not in tokenizer.encode("a</s>")


def test_control_tokens_not_marked_special_are_not_encoded_and_text_ones_are(tmp_path):
    names = ["<|endoftext|>", *FIM, "  "]
    tokenizer = Tokenizer.load(other_tokenizer(tmp_path / "t.json", names, special=False))
    assert tokenizer.bos_id == tokenizer.eos_id == 32 and tokenizer.fim_ids == (33, 34, 35)
    assert not set(tokenizer.encode(f"a<|endoftext|>{FIM[0]}")) & {32, 33}
    assert tokenizer.encode("a  b") == [0, 36, 1]


def test_what_is_wrong_with_a_tokenizer_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r"no end-of-text token .* expected <｜end▁of▁sentence｜> or one of </s>"):
        Tokenizer.load(other_tokenizer(tmp_path / "t.json", []))
    with pytest.raises(ConfigError, match=r"tokenizer=.*none.json: no such file; expected bpe, bytes or"):
        Tokenizer.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(ConfigError, match=r"bad.json: not a tokenizer.json"):
        Tokenizer.load(tmp_path / "bad.json")


def test_a_vocabulary_that_does_not_fit_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r"model.vocab_size=261: data.tokenizer=bytes needs at least 262"):
        check_vocabulary("bytes", 261)
    other = Tokenizer.load(other_tokenizer(tmp_path / "t.json", ["</s>"]))
    with pytest.raises(ConfigError, match=r"model.vocab_size=30: data.tokenizer=t.json needs at least 33"):
        check_vocabulary("t.json", 30, other)
    with pytest.raises(
        ConfigError, match=r"data.fim_rate=0.1: expected 0, for data.tokenizer=t.json has no tokens <｜fim▁begin｜>"
    ):
        check_vocabulary("t.json", 40, other, 0.1)
