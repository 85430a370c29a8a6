"""Text comes back from its tokens, whole and in a stream; special tokens are never spelled by a text."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, processors

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


def hub_folder(folder, added: list[str], **files):
    """A folder of a tokenizer.json and the files that say more, each of them JSON values or a text."""
    other_tokenizer(folder / "tokenizer.json", added)
    for name, values in files.items():
        (folder / f"{name}.json").write_text(values if isinstance(values, str) else json.dumps(values), "utf-8")
    return folder


def test_a_folders_files_say_which_tokens_begin_and_end_a_text(tmp_path):
    names = ["<s>", "</s>", "<begin>", "<stop>", "<turn>"]  # 32 to 36
    config = {"bos_token": "<begin>", "eos_token": {"content": "<stop>", "lstrip": False}, "pad_token": None}
    folder = hub_folder(tmp_path, names, tokenizer_config=config)
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (34, 35, 35)
    assert tokenizer.special_ids == {"bos": 34, "eos": 35} and tokenizer.eos_ids == (35,)
    assert Tokenizer.load(folder / "tokenizer.json").eos_id == 35
    hub_folder(folder, names, tokenizer_config=config | {"eos_token": "<none>", "pad_token": "<turn>"})
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.eos_id, tokenizer.pad_id) == (33, 36)  # what is not in the vocabulary is no name
    hub_folder(folder, names, tokenizer_config={}, special_tokens_map={"bos_token": "<begin>"})
    assert Tokenizer.load(folder).bos_id == 34
    other_tokenizer(folder / "alone.json", names)
    assert Tokenizer.load(folder / "alone.json").bos_id == 32


def test_a_text_can_end_in_several_ways(tmp_path):
    names = ["<s>", "</s>", "<turn>"]
    folder = hub_folder(tmp_path, names, generation_config={"eos_token_id": [34, 33]}, config={"eos_token_id": 32})
    assert Tokenizer.load(folder).eos_ids == (33, 34)
    hub_folder(folder, names, generation_config={})
    assert Tokenizer.load(folder).eos_ids == (33, 32)
    hub_folder(folder, names, generation_config={"eos_token_id": 34})
    assert Tokenizer.load(folder).eos_ids == (33, 34)
    for name in ("generation_config.json", "config.json"):
        (folder / name).unlink()
    assert Tokenizer.load(folder).eos_ids == (33,) == (Tokenizer.load(folder).eos_id,)


def test_the_tokens_of_a_conversation_are_known_by_name(tmp_path):
    names = ["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "[BOS]", "[EOS]", *FIM]
    ids = dict(
        zip(
            ("user", "assistant", "think", "end_think", "bos", "eos", "fim_begin", "fim_hole", "fim_end"), range(32, 41)
        )
    )
    tokenizer = Tokenizer.load(other_tokenizer(tmp_path / "t.json", names))
    assert tokenizer.special_ids == ids and tokenizer.fim_ids == (38, 39, 40)
    other = Tokenizer.load(other_tokenizer(tmp_path / "t.json", ["[EOS]", "<|im_user|>", "<|im_assistant|>"]))
    assert other.special_ids == {"eos": 32, "user": 33, "assistant": 34} and other.bos_id == 32
    assert KINDS["bytes"].special_ids == dict(zip(("bos", "eos", "pad", "fim_begin", "fim_hole", "fim_end"), range(6)))


@kinds
def test_control_tokens_count_in_a_rendered_text(tokenizer):
    text = f"{SPECIALS[0]}a{SPECIALS[1]}\n{FIM[0]}"
    assert tokenizer.encode_rendered(text) == [0, *tokenizer.encode("a"), 1, *tokenizer.encode("\n"), 3]
    assert tokenizer.encode_rendered(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    assert tokenizer.decode(tokenizer.encode_rendered(text), skip_special=False) == text


def test_a_rendered_text_is_neither_cut_nor_filled_nor_begun(tmp_path):
    backend = Backend.from_file(str(other_tokenizer(tmp_path / "t.json", ["<s>", "</s>"])))
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 32), ("</s>", 33)])
    backend.save(str(tmp_path / "t.json"))
    tokenizer = Tokenizer.load(tmp_path / "t.json")
    assert tokenizer.encode_rendered("abc</s>") == [0, 1, 2, 33] and tokenizer.encode("abc") == [0, 1, 2]


def test_a_tokenizer_of_several_files_is_kept_whole(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    config = {"bos_token": "<begin>", "eos_token": "<stop>"}
    names = ["<s>", "</s>", "<begin>", "<stop>"]
    first = Tokenizer.load(
        hub_folder(tmp_path / "a", names, tokenizer_config=config, config={"eos_token_id": [33, 35]})
    )
    first.save(tmp_path / "b" / "tokenizer.json")
    for name, text in first.beside().items():
        (tmp_path / "b" / name).write_text(text, "utf-8")
    again = Tokenizer.load(tmp_path / "b")
    assert (
        (again.bos_id, again.eos_id, again.eos_ids) == (first.bos_id, first.eos_id, first.eos_ids) == (34, 35, (35, 33))
    )
    assert KINDS["bpe"].beside() == {} == Tokenizer.load(other_tokenizer(tmp_path / "t.json", names)).beside()


@pytest.mark.parametrize(
    "files, message",
    [
        ({"tokenizer_config": "{"}, r"tokenizer_config.json: not JSON: Expecting property name"),
        ({"tokenizer_config": "[1]"}, r"tokenizer_config.json: expected an object, got a list"),
        (
            {"tokenizer_config": "\ud800".encode("utf-8", "surrogatepass")},
            r"tokenizer_config.json: not JSON: 'utf-8' codec",
        ),
        ({"tokenizer_config": "[" * 99999}, r"tokenizer_config.json: not JSON: "),
        ({"tokenizer_config": {"eos_token": 1}}, r"eos_token=1: expected a text, or an object with its content"),
        ({"tokenizer_config": {"eos_token": {"a": 1}}}, r"eos_token=\{'a': 1\}: expected a text, or an object"),
        ({"special_tokens_map": {"bos_token": []}}, r"special_tokens_map.json: bos_token=.*: expected a text, or"),
        ({"generation_config": {"eos_token_id": "1"}}, r"eos_token_id=1: expected a token's id, or a list of them"),
        ({"generation_config": {"eos_token_id": [1, -1]}}, r"eos_token_id=1,-1: expected a token's id, or a list"),
        ({"generation_config": {"eos_token_id": True}}, r"eos_token_id=true: expected a token's id, or a list"),
        ({"config": "?"}, r"config.json: not JSON: Expecting value"),
    ],
)
def test_what_is_wrong_beside_a_tokenizer_is_said_in_one_line(tmp_path, files, message):
    hub_folder(tmp_path, ["</s>"])
    for name, values in files.items():
        text = (
            values
            if isinstance(values, bytes)
            else (values if isinstance(values, str) else json.dumps(values)).encode()
        )
        (tmp_path / f"{name}.json").write_bytes(text)
    with pytest.raises(ConfigError, match=message) as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


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
