"""Where the answer stands in what a model wrote, and what it says in plain form."""

import re
from fractions import Fraction

LONGEST = 1000  # characters of an answer that is more than a text: longer ones are equal only if they are the same
_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,3})?")
_GROUPED = re.compile(r"[-+]?\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+)(?:\.\d*)?%?")
_FRACTION = re.compile(r"([-+]?)(\d*)\\frac(?:\{(\d+)\}|(\d))(?:\{(\d+)\}|(\d))")
_MIXED = re.compile(r"([-+]?)(\d+) ([1-9]\d*)/(\d+)")
_TAG = re.compile(r"</?(?:think|answer)>")
_ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_BRACE = re.compile(r"(?<=\\)f?boxed\s*+\{|\\[\\{}]|[{}]")
_STYLED = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_WORD = re.compile(r"[^\W\d_]{2,}")


def without_thinking(text: str) -> str:
    """What stands behind the last </think>, all of it if there is none; and before a <think> that is not closed."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


def thinking(text: str) -> str:
    """What stands before the last </think>, all of it if there is none; without the tags."""
    before, end, behind = text.rpartition("</think>")
    return _TAG.sub(" ", before if end else behind)


def last_boxed(text: str) -> str | None:
    r"""What the last whole \boxed{...} holds, braces in it matched; \{ and \} are no braces. None if there is none."""
    begun: list[int | None] = []  # of each open brace: where the box begins, None if it is none
    first, inside = -1, None
    for found in _BRACE.finditer(text):
        if "boxed" in found[0]:
            begun.append(found.end())
        elif found[0] == "{":
            begun.append(None)
        elif found[0] == "}" and begun:
            start = begun.pop()
            if start is not None and start > first:
                first, inside = start, text[start : found.start()].strip()
    return inside


def last_answer(text: str) -> str | None:
    """What the last <answer>...</answer> holds. None if there is none."""
    found = _ANSWER.findall(text)
    return found[-1].strip() if found else None


def given_answer(text: str) -> str | None:
    r"""What the last \boxed{} behind the thinking holds, or else the last <answer>. None if there is neither."""
    text = without_thinking(text)
    boxed = last_boxed(text)
    return last_answer(text) if boxed is None else boxed


def unstyled(text: str) -> str:
    r"""The text with what \text{}, \textbf{}, \mathrm{} and the like hold in their place."""
    return _STYLED.sub(r"\1", text)


def plain(answer: str) -> str:
    r"""The answer without what means nothing: $, \left, \text{}, spaces but for those between digits, a full stop at
    the end, commas and spaces between a number's groups of three, the case of words."""
    answer = answer.strip().strip("$").replace("\\!", "").replace("\\,", " ").replace("\\%", "%")
    answer = re.sub(r"\\(?:left|right|displaystyle)(?![a-zA-Z])", "", answer)
    answer = re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", unstyled(answer))
    answer = re.sub(r"(?<!\d) | (?!\d)", "", re.sub(r"\s+", " ", answer.rstrip(".")))
    if _GROUPED.fullmatch(answer):
        return re.sub("[, ]", "", answer)
    return answer if "\\" in answer else _WORD.sub(lambda word: word[0].lower(), answer)


def number(answer: str) -> Fraction | None:
    r"""The number that an answer in plain form is: 3, -0.5, 1e3, 7/2, 3 1/2, \frac{7}{2}, 50%. None if it is none."""
    if len(answer) > LONGEST:
        return None
    if found := _FRACTION.fullmatch(answer):
        sign, whole, *sides = found.groups()
        over, under = filter(None, sides)
        answer = f"{sign}{whole} {over}/{under}" if whole else f"{sign}{over}/{under}"
    if found := _MIXED.fullmatch(answer):
        sign, whole, over, under = found[1], *map(int, found.groups()[1:])
        return (whole + Fraction(over, under)) * (-1 if sign == "-" else 1) if under else None
    percent = answer.endswith("%")
    parts = answer.removesuffix("%").split("/")
    if len(parts) > 2 or not all(_NUMBER.fullmatch(part) for part in parts):
        return None
    values = [Fraction(part) for part in parts]
    if len(values) == 2 and not values[1]:
        return None
    value = values[0] / values[1] if len(values) == 2 else values[0]
    return value / 100 if percent else value
