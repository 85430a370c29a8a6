"""Reward for a multiple choice: the letter that an answer settles on."""

import re
from contextlib import nullcontext

from dsjax.config import show
from dsjax.posttrain.problem import Problem, Reward
from dsjax.posttrain.rewards.answer import given_answer, unstyled, without_thinking

_MARKS = re.compile(r"[$*]|\\[()\[\]]")  # bold letters, formulas
_HEDGE = r"\s*+(?:(?i:or)\b|[/?]|(?:[,&]|(?i:and)\b)\s*+(?:[(\[][A-Za-z][)\]]|[A-HJ-Z]\b))"  # A or B; I is a word
_ALONE = re.compile(r"[(\[]?([A-Za-z])[)\].:]?")
_OPTION = re.compile(rf"[(\[]?([A-Za-z])[)\].:](?!{_HEDGE})\s.*", re.DOTALL)  # B. Paris
_SAID = re.compile(
    r"(?i:answer)\s*+(?::|(?i:is)\b)[\s:]*+(?:(?i:option|choice)\s++)?"
    rf"(?:[(\[]\s*+([A-Za-z])\s*+[)\]]|([A-Z])\b(?!')[)\]]?)({_HEDGE})?"
)


def chosen_letter(text: str) -> str | None:
    r"""The letter in the last \boxed{}, or else in the last answer tags; where there is neither, the one that is the
    last line, or that the text at last calls its answer. None where it is more than one."""
    text = _MARKS.sub("", unstyled(without_thinking(text)))
    place = given_answer(text)
    if place is not None:
        found = _ALONE.fullmatch(place) or _OPTION.fullmatch(place)
        return found[1].upper() if found else _said(place)
    found = _ALONE.fullmatch(text.strip().rpartition("\n")[2].strip())
    return found[1].upper() if found else _said(text)


def _said(text: str) -> str | None:
    said = _SAID.findall(text)
    if not said:
        return None
    bracketed, bare, hedge = said[-1]
    return None if hedge else (bracketed or bare).upper()


def choice_reward(text: str, letter: str) -> float:
    """1 if the text settles on the letter, else 0."""
    return float(chosen_letter(text) == letter.strip().upper())


def _lacks(problem: Problem) -> str | None:
    if re.fullmatch(r"\s*[A-Za-z]\s*", problem.answer):
        return None
    return f"answer={show(problem.answer)}: expected a letter, for the reward choice"


REWARD = Reward(lambda: nullcontext(lambda problem, text: choice_reward(text, problem.answer)), _lacks)
