"""Reward for a multiple choice: the letter that an answer settles on."""

import re
from contextlib import nullcontext

from dsjax.config import show
from dsjax.posttrain.problem import Problem, Reward
from dsjax.posttrain.rewards.answer import last_answer, last_boxed, without_thinking

_SAID = re.compile(r"(?:answer|option|choice)\s*(?:is|:)?\s*[*(\[]*\s*([A-Z])\b(?![a-z'])", re.IGNORECASE)
_ALONE = re.compile(r"[(\[]?([A-Z])[)\].:]?", re.IGNORECASE)


def chosen_letter(text: str) -> str | None:
    r"""The letter in the last \boxed{} or answer tags, or that is the last line, or that the text calls its answer."""
    text = without_thinking(text)
    for place in (last_boxed(text), last_answer(text), text.strip().rpartition("\n")[2]):
        if place is not None and (found := _ALONE.match(place.strip())) and len(place.strip()) <= len(found[0]):
            return found[1].upper()
    said = _SAID.findall(text)
    return said[-1].upper() if said else None


def choice_reward(text: str, letter: str) -> float:
    """1 if the text settles on the letter, else 0."""
    return float(chosen_letter(text) == letter.strip().upper())


def _lacks(problem: Problem) -> str | None:
    if re.fullmatch(r"\s*[A-Za-z]\s*", problem.answer):
        return None
    return f"answer={show(problem.answer)}: expected a letter, for the reward choice"


REWARD = Reward(lambda: nullcontext(lambda problem, text: choice_reward(text, problem.answer)), _lacks)
