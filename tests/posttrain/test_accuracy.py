"""Right and wrong answers in many notations, and answers that are made to take for ever."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from dsjax.posttrain.rewards.accuracy import Judges, accuracy_reward

pytest.importorskip("math_verify", reason="needs the posttrain extra")


@pytest.fixture(scope="module")
def judges():
    with Judges(2, seconds=2.0) as judges:
        yield judges


def never(expected, answer):
    raise AssertionError("no expression needs to be compared")


@pytest.mark.parametrize(
    "text, expected, reward",
    [
        (r"\boxed{4}", "4", 1), (r"\boxed{4.0}", "4", 1), (r"\boxed{1,000}", "1000", 1),
        (r"\boxed{\frac{1}{2}}", "0.5", 1), (r"\boxed{5}", "4", 0), ("4", "4", 0),
        (r"<think>\boxed{4}</think> so it is", "4", 0), ("<answer>4</answer>", "4", 1),
        (r"<answer>4</answer> \boxed{5}", "4", 0), (r"\boxed{}", "4", 0), (r"\boxed{\text{Paris}}", "paris", 1),
        (r"<think>try \boxed{4} hmm", "4", 0), (r"<think>a</think> \boxed{5} <think>or \boxed{4}?", "4", 0),
        (r"a</think> \boxed{4}", "4", 1), (r"\boxed{Pairs}", "Paris", 0), (r"\boxed{listen}", "silent", 0),
        (r"\boxed{\text{CAB}}", "ABC", 0), (r"\boxed{50\%}", "50", 1), (r"\boxed{50}", r"50\%", 1),
        (r"\boxed{50\%}", "0.5", 1), (r"\boxed{50\%}", "5", 0), (r"\boxed{\Delta}", r"\delta", 0),
        (r"\boxed{X}", "x", 0), (rf"\boxed{{{'1' * 1000}2}}", "1" * 1000 + "3", 0),
        (rf"\boxed{{{'12' * 1000}}}", "12" * 1000, 1), (r"\boxed{1 1/2}", "1.5", 1), (r"\boxed{1 1/2}", "11/2", 0),
    ],
)  # fmt: skip
def test_texts_and_numbers_need_no_algebra(text, expected, reward):
    assert accuracy_reward(text, expected, never) == reward


@pytest.mark.parametrize(
    "answer, expected, reward",
    [
        (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}", 1), ("x+1", "1+x", 1), (r"\{1,2\}", r"\{2,1\}", 1),
        ("(1,2)", "(2,1)", 0), (r"2\pi", r"\pi", 0), ("x+1", "x+2", 0), ("}{", r"\pi", 0), (r"\undefined{", r"\pi", 0),
        ("a\0b", "x", 0),
    ],
)  # fmt: skip
def test_expressions(judges, answer, expected, reward):
    assert accuracy_reward(rf"\boxed{{{answer}}}", expected, judges.same) == reward


def test_what_takes_for_ever_is_wrong_and_stops_nothing(judges):
    """More than there are workers at once, and those that come after are judged as before."""
    before, hostile = judges.killed, r"\boxed{9^{9^{9^{9^{9}}}}}"
    with ThreadPoolExecutor(4) as pool:
        rewards = list(pool.map(lambda _: accuracy_reward(hostile, "x^2", judges.same), range(3)))
        assert rewards == [0, 0, 0]
        good = list(pool.map(lambda _: accuracy_reward(r"\boxed{x+1}", "1+x", judges.same), range(3)))
    assert good == [1, 1, 1]
    assert judges.killed == before + 3
