"""What rewards read out of a text, and what they give for it."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsjax.posttrain.rewards.answer import last_answer, last_boxed, number, plain
from dsjax.posttrain.rewards.choice import choice_reward, chosen_letter
from dsjax.posttrain.rewards.code import last_program
from dsjax.posttrain.rewards.format import format_reward
from dsjax.posttrain.rewards.language import language_reward, words_by_script


@pytest.mark.parametrize(
    "text, inside",
    [
        (r"so \boxed{4}", "4"),
        (r"\boxed{1} no, \boxed{ 2 }", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {x}", "x"),
        (r"\fbox{1} \fboxed{3}", "3"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\\boxed{6} {\boxed{7}", "7"),
        (r"\boxed{1 \{ {2} \\} } 3}", r"1 \{ {2} \\"),
        (r"\boxed{", None),
        ("boxed{3}", None),
        ("", None),
    ],
)
def test_the_last_whole_box(text, inside):
    assert last_boxed(text) == inside


@given(st.text(alphabet="\\{}boxed ab1", max_size=40))
def test_no_text_breaks_the_search_for_a_box(text):
    inside = last_boxed(text)
    assert inside is None or inside in text


@given(st.recursive(st.text(alphabet="ab1", max_size=5), lambda inner: inner.map(lambda s: "{" + s + "}")))
def test_what_is_put_in_a_box_comes_out(inner):
    assert last_boxed(r"text \boxed{" + inner + "} text") == inner


def test_the_last_answer_between_tags():
    assert last_answer("<answer>1</answer> <answer> 2\n</answer>") == "2"
    assert last_answer("<answer>1 <answer>2</answer>") == "2"
    assert last_answer("<answer>1") is None


@pytest.mark.parametrize(
    "text, value",
    [
        ("3", 3), ("-0.50", Fraction(-1, 2)), ("1,234,567", 1234567), ("$1/3$", Fraction(1, 3)),
        ("50\\%", Fraction(1, 2)),
        (r"\dfrac{7}{2}", Fraction(7, 2)), (r"-\frac12", Fraction(-1, 2)), ("1e3", 1000), ("1/0", None), ("x", None),
        ("1/2/3", None), ("12,34", None), ("", None), (r"\text{ 42 }", 42), ("42.", 42), ("1e9999", None),
        ("1 1/2", Fraction(3, 2)), (r"-2\frac{1}{4}", Fraction(-9, 4)), ("1 000/3", None), ("5 6", None),
        ("12 345 678.5", Fraction("12345678.5")), (r"1\,000", 1000), ("1,000 000", None), ("1 000,5", None),
        (r"\frac123", None), (r"\frac{123}", None), (r"\frac1{20}", Fraction(1, 20)), (r"\frac10", None),
        ("1 1/0", None), ("9" * 5000, None),
    ],
)  # fmt: skip
def test_numbers(text, value):
    assert number(plain(text)) == value


def test_plain_forms():
    assert plain("(1,200)") != plain("(1200)") and plain("x = 1 , 200") == "x=1,200"
    assert plain("New  York") == plain(r"\text{new york}") and plain("X") != plain("x")
    assert plain(r"\Delta") != plain(r"\delta") and plain("x + Y") == "x+Y"


@pytest.mark.parametrize("read", [last_boxed, last_answer, plain, chosen_letter, last_program, format_reward])
@pytest.mark.parametrize(
    "part",
    [
        r"\boxed{",
        r"\boxed",
        "\\",
        "<answer>",
        "answer",
        "answer is",
        "(",
        "</think> <answer>",
        "```\n",
        "{}",
        " ",
        "1 ",
    ],
)
def test_a_long_text_is_read_in_one_pass(read, part):
    for text in (part * (200_000 // len(part)), part + " " * 200_000, f"<think>{part * 20_000}"):
        read(text)
        read(text + "x")


WHOLE = "<think>because</think> <answer>4</answer>"


def test_format():
    assert format_reward(WHOLE) == format_reward(f"\n{WHOLE}\n") == 1
    for wrong in (
        "", "4", "<answer>4</answer>", "<think>a</think>4", WHOLE + "more", "before" + WHOLE, WHOLE + WHOLE,
        "<answer>4</answer><think>a</think>", "<think>a<answer>4</answer></think>",
        "<think> </think><answer> </answer>", "<think> </think><answer>4</answer>",
        "<think>a</think><answer> </answer>", "<think></think><answer>4</answer>", "<think>a</think><answer></answer>",
        "<think>a</think><think>b</think><answer>4</answer>",
    ):  # fmt: skip
        assert format_reward(wrong) == 0, wrong
    assert format_reward("<think>a</think>\nIt is 4.", answer_tags=False) == 1
    for wrong in ("<think>a</think>", "<think>a</think> ", "<think> </think>4", "<think></think>4"):
        assert format_reward(wrong, answer_tags=False) == 0, wrong


def test_language():
    assert language_reward("Only English, with $x+y$ and 12 numbers") == 1
    assert language_reward("") == language_reward("12 + 3 = 15") == 1
    assert language_reward("So 我们 have") == 0.5 and language_reward("So 我们 have", "zh") == 0.5
    assert language_reward("これは漢字です", "ja") == 1 and language_reward("это so", "ru") == 0.5
    assert words_by_script("don't naïve") == {"latin": 3}
    assert words_by_script("हिन्दी में") == {"devanagari": 2} and words_by_script("cafe\u0301s 𝑥") == {"latin": 2}
    assert words_by_script("ｗｅ have α, Δx and μ") == {"latin": 4} and words_by_script("και η ζωή") == {"greek": 2}
    assert language_reward("<think>我们</think> <answer>we have</answer>", "zh") == 1  # neither tags nor the answer
    assert language_reward("<think>我们 so", "zh") == 2 / 3
    with pytest.raises(ValueError, match="language='klingon'"):
        language_reward("x", "klingon")


@pytest.mark.parametrize(
    "text, letter",
    [
        (r"\boxed{B}", "B"), ("<think>A?</think> The answer is (c).", "C"), ("I think\nD.", "D"),
        ("<answer>a</answer>", "A"),
        ("The answer: **B**", "B"), ("The answer is Apple", None), ("<think>answer is A</think> no idea", None),
        (r"\boxed{BC}", None), ("", None), ("It's option E, not option A? The answer is E", "E"),
        ("The answer is a tricky one", None), ("The answer is B, because option A is wrong.", "B"),
        ("The answer is B. I checked every choice I could.", "B"), (r"Option A fails. \boxed{\text{B}}", "B"),
        ("the answer is A or B", None), ("The answer is (a) and (b).", None), ("The answer is A, B", None),
        ("The answer is B, I think", "B"), ("The answer is C. No, the answer is A/B", None),
        ("The answer is B and that is all.", "B"), ("Answer A is wrong.", None),
        ("\\boxed{BC}\nB", None), (r"\boxed{\text{B}}", "B"), (r"\boxed{\textbf{(B)}}", "B"),
        ("<answer>B. Paris</answer>", "B"), ("<answer>A. or B.</answer>", None), ("<answer>None</answer>\nB", None),
        ("<answer>The answer is (b) Paris</answer>", "B"), ("so\n**B**", "B"), ("The answer is $B$", "B"),
        (r"The answer is \(B\).", "B"), ("The correct answer is: B", "B"), ("The answer is option D.", "D"),
    ],
)  # fmt: skip
def test_the_letter_that_is_chosen(text, letter):
    assert chosen_letter(text) == letter
    assert choice_reward(text, "b") == float(letter == "B")
