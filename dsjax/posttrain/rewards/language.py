"""Reward for staying in one language: the share of words of a chain of thought that are of it (R1, section 2.3)."""

import itertools
import re
import unicodedata
from contextlib import nullcontext

from dsjax.config import show
from dsjax.posttrain.problem import Problem, Reward
from dsjax.posttrain.rewards.answer import thinking

_SCRIPTS = {
    "latin": ("en", "de", "fr", "es", "it", "pt", "nl", "pl", "tr", "vi"),
    "cjk": ("zh",),
    "hiragana": ("ja",),
    "hangul": ("ko",),
    "cyrillic": ("ru", "uk", "bg"),
    "greek": ("el",),
    "arabic": ("ar", "fa"),
    "hebrew": ("he",),
    "devanagari": ("hi",),
    "thai": ("th",),
}
LANGUAGES = {language: script for script, languages in _SCRIPTS.items() for language in languages}
_ALSO = {"hiragana": {"hiragana", "katakana", "cjk"}, "hangul": {"hangul", "cjk"}}
_BY_LETTER = {"cjk", "hiragana", "katakana"}
_NOT_PROSE = re.compile(r"```.*?```|\$\$.*?\$\$|\$[^$\n]*\$|\\[a-zA-Z]+|https?://\S+", re.DOTALL)
_RUN = re.compile(r"[^\W\d_]+")


def words_by_script(text: str) -> dict[str, int]:
    """How many words of each script. A Chinese character or a kana is one; formulas, fenced code, numbers and single
    Greek letters, which are mathematics, are none."""
    counts: dict[str, int] = {}
    for run in _RUN.findall(_NOT_PROSE.sub(" ", _letters(text))):
        for script, letters in itertools.groupby(run, _script):
            n = len(list(letters))
            if script is not None and (script, n) != ("greek", 1):
                counts[script] = counts.get(script, 0) + (n if script in _BY_LETTER else 1)
    return counts


def _letters(text: str) -> str:
    """The text with one sign for a letter, and without the marks on it, which would divide a word."""
    if text.isascii():
        return text
    return "".join(c for c in unicodedata.normalize("NFKC", text) if not unicodedata.category(c).startswith("M"))


def language_reward(text: str, language: str = "en") -> float:
    """The share of the thinking's words in the script of the language; 1 where there are none, and of all words where
    no </think> ends it. Raises ValueError for an unknown language.

    By script, so that it tells English from Chinese, which is what mixes, and not from German.
    """
    if language not in LANGUAGES:
        raise ValueError(f"language={language!r}: expected one of {', '.join(sorted(LANGUAGES))}")
    script, counts = LANGUAGES[language], words_by_script(thinking(text))
    total = sum(counts.values())
    own = sum(counts.get(name, 0) for name in _ALSO.get(script, {script}))
    return own / total if total else 1.0


def _script(letter: str) -> str | None:
    name = unicodedata.name(letter, "").split(" ")[0].split("-")[0].lower()
    return name or None


def _lacks(problem: Problem) -> str | None:
    language = problem.facts.get("language")
    if isinstance(language, str) and language in LANGUAGES:
        return None
    given = "" if language is None else f"={show(language)}"
    return f"language{given}: expected one of {', '.join(sorted(LANGUAGES))}, for the reward language"


REWARD = Reward(
    lambda: nullcontext(lambda problem, text: language_reward(text, problem.facts["language"])),
    _lacks,
)
