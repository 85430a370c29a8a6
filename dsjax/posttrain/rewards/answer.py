"""Where the answer stands in what a model wrote, and what it says in plain form."""

import re
from fractions import Fraction

_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,3})?")
_TAG = re.compile(r"</?(?:think|answer)>")
_GROUPED = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_LONGEST = 1000  # characters of an answer that is compared


def without_thinking(text: str) -> str:
    """What stands behind the last </think>; all of it if there is none."""
    return text.rpartition("</think>")[2]


def thinking(text: str) -> str:
    """What stands before the last </think>, all of it if there is none; without the tags."""
    before, end, behind = text.rpartition("</think>")
    return _TAG.sub(" ", before if end else behind)


def last_boxed(text: str) -> str | None:
    r"""What the last whole \boxed{...} holds, braces in it matched; \{ and \} are no braces. None if there is none."""
    for found in reversed(list(re.finditer(r"\\f?boxed\s*\{", text))):
        depth, at = 1, found.end()
        while at < len(text):
            if text[at] == "\\":
                at += 2
                continue
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            if depth == 0:
                return text[found.end() : at].strip()
            at += 1
    return None


def last_answer(text: str) -> str | None:
    """What the last <answer>...</answer> holds. None if there is none."""
    found = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", text, re.DOTALL)
    return found[-1].strip() if found else None


def plain(answer: str) -> str:
    r"""The answer without what means nothing: $, \left, \text{}, spaces, a full stop at the end."""
    answer = answer[:_LONGEST].strip().strip("$").replace("\\!", "").replace("\\,", " ").replace("\\%", "%")
    answer = re.sub(r"\\(?:left|right|displaystyle)(?![a-zA-Z])", "", answer)
    answer = re.sub(r"\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*)\}", r"\1", answer)
    answer = re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", answer)
    answer = _GROUPED.sub("", answer.rstrip("."))
    return re.sub(r"\s+", "", answer).lower()


def number(answer: str) -> Fraction | None:
    r"""The number that an answer in plain form is: 3, -0.5, 1e3, 7/2, \frac{7}{2}, 50%. None if it is none."""
    answer = re.sub(r"^([-+]?)\\frac\{?(\d+)\}?\{?(\d+)\}?$", r"\1\2/\3", answer)
    percent = answer.endswith("%")
    parts = answer.removesuffix("%").split("/")
    if len(parts) > 2 or not all(_NUMBER.fullmatch(part) for part in parts):
        return None
    values = [Fraction(part) for part in parts]
    if len(values) == 2 and not values[1]:
        return None
    value = values[0] / values[1] if len(values) == 2 else values[0]
    return value / 100 if percent else value
