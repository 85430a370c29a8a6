"""Reasoning, content and tool calls: the same whatever the pieces, in the formats of V3 and V3.1."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.infer.server.answer import Answer, arguments_problem
from dsjax.infer.server.chat import final_answer, vote

V3 = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
    '{"city": "Hangzhou"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```'
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
V31 = (
    '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Hangzhou"}<｜tool▁call▁end｜>'
    "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
TEXTS = {
    "plain": ("Hello < there", False, ("", "Hello < there", 0)),
    "opened by the model": ("<think>\nso, so\n</think>\n\nFour.", False, ("so, so\n", "Four.", 0)),
    "opened by the template": ("so, so\n</think>\n\nFour.", True, ("so, so\n", "Four.", 0)),
    "never ended": ("so, so", True, ("so, so", "", 0)),
    "no reasoning": ("</think>Four", True, ("", "Four", 0)),
    "V3": ("I look." + V3, False, ("", "I look.", 2)),
    "V3.1": ("why</think>" + V31, True, ("why", "", 2)),
    "cut off": (
        "I look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>now",
        False,
        ("", "I look.<｜tool▁call▁begin｜>now", 0),
    ),
}


@given(st.sampled_from(sorted(TEXTS)), st.data())
@settings(deadline=None)
def test_an_answer_is_the_same_whatever_the_pieces(name, data):
    text, thinking, (reasoning, content, n_calls) = TEXTS[name]
    answer, at, pieces = Answer(thinking, tools=True), 0, []
    while at < len(text):
        n = data.draw(st.integers(1, 40))
        pieces.append(answer.push(text[at : at + n]))
        at += n
    pieces.append(answer.end())
    assert (answer.reasoning, answer.content, len(answer.calls)) == (reasoning, content, n_calls)
    assert "".join(p.reasoning for p in pieces) == reasoning and "".join(p.content for p in pieces) == content
    if n_calls:
        first, second = answer.calls
        assert (first.name, json.loads(first.arguments)) == ("get_weather", {"city": "Hangzhou"})
        assert (second.name, second.arguments) == ("now", "{}") and first.id != second.id


def test_calls_are_text_where_no_tool_was_given():
    answer = Answer()
    answer.push(V31)
    answer.end()
    assert answer.content == V31 and not answer.calls


def test_arguments_that_are_no_object_are_told():
    answer = Answer(tools=True)
    answer.push(V31.replace('{"city": "Hangzhou"}', '{"city": ').replace("{}", "[1]"))
    assert "Expecting value" in arguments_problem(answer.calls[0])
    assert arguments_problem(answer.calls[1]) == "expected an object, got a list"


def test_the_final_answer_is_the_last_box_or_number_and_most_votes_win():
    assert final_answer(r"so \boxed{1} and \boxed{\frac{1}{2}}") == r"\frac{1}{2}"
    assert final_answer("It is 1,234.5, I think.") == "1234.5" and final_answer(" a\n b ") == "a b"
    best, votes = vote(["it is 3", "it is 4", "no: 4", r"\boxed{3}", "4"])
    assert best == 1 and votes == [{"answer": "4", "votes": 3}, {"answer": "3", "votes": 2}]
