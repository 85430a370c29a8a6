"""Text as it comes: whole characters, nothing of a stop string, nothing lost."""

from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.data.tokenizer import bytes_tokenizer
from dsjax.infer.text import Text

TOKENIZER = bytes_tokenizer()


@given(st.text("abé😀", max_size=30), st.lists(st.text("abé", min_size=1, max_size=4), max_size=3), st.data())
@settings(deadline=None)
def test_pieces_are_the_text_up_to_the_first_stop_string(whole, stops, data):
    ids = TOKENIZER.encode(whole)
    text, pieces, at = Text(TOKENIZER, stops), [], 0
    while at < len(ids):
        n = data.draw(st.integers(1, 5))
        pieces.append(text.push(ids[at : at + n]))
        at += n
    pieces.append(text.end())
    ends = sorted((whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole)
    assert "".join(pieces) == (whole[: ends[0][1]] if ends else whole)
    assert (text.stopped is not None) == bool(ends)
    assert all("\ufffd" not in piece for piece in pieces)


def test_what_cannot_become_a_stop_string_comes_at_once():
    text = Text(TOKENIZER, ["stop"])
    assert [text.push(TOKENIZER.encode(c)) for c in "a sto"] == ["a", " ", "", "", ""]
    assert text.push(TOKENIZER.encode("re")) == "store"
    assert text.push(TOKENIZER.encode("st")) == "" and text.end() == "st"


def test_the_stop_string_is_kept_on_request_and_of_two_the_longer():
    text = Text(TOKENIZER, ["bc", "abc"], keep_stop=True)
    assert text.push(TOKENIZER.encode("xabcd")) == "xabc" and text.stopped == "abc"
    assert text.push(TOKENIZER.encode("more")) == "" and text.end() == ""


def test_bytes_that_are_no_character_come_at_the_end():
    text = Text(TOKENIZER)
    half = TOKENIZER.encode("é")[:1]
    assert text.push(half) == "" and text.end() == "\ufffd"
