"""Reward for the form of an answer: reasoning between think tags, then the answer between its own (R1-Zero)."""

import re
from contextlib import nullcontext

from dsjax.posttrain.problem import Reward

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_WHOLE = re.compile(r"\s*<think>(.+)</think>\s*<answer>(.+)</answer>\s*", re.DOTALL)
_THOUGHT = re.compile(r"\s*<think>(.+)</think>\s*\S.*", re.DOTALL)


def format_reward(text: str, *, answer_tags: bool = True) -> float:
    """1 if each tag stands there once and in order, with something in each pair and nothing outside; else 0.

    answer_tags: False asks for the think tags and something behind them (R1's own form).
    """
    if any(text.count(tag) != 1 for tag in (_TAGS if answer_tags else _TAGS[:2])):
        return 0.0
    found = (_WHOLE if answer_tags else _THOUGHT).fullmatch(text)
    return float(found is not None and all(inside.strip() for inside in found.groups()))


REWARD = Reward(lambda: nullcontext(lambda problem, text: format_reward(text)), lambda problem: None)
THINK = Reward(lambda: nullcontext(lambda problem, text: format_reward(text, answer_tags=False)), lambda problem: None)
