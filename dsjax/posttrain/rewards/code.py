"""Reward for a program: from standard input to standard output, in the sandbox."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from dsjax.posttrain.problem import Judge, Problem, Reward
from dsjax.posttrain.rewards import sandbox
from dsjax.posttrain.rewards.answer import without_thinking
from dsjax.posttrain.rewards.sandbox import Bounds, run_python

_FENCED = re.compile(r"^([ \t]*)```[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)


def last_program(text: str) -> str | None:
    """The last fenced block behind the thinking that is marked as Python, or else that is not marked; without the
    fence's indent. None if there is none."""
    last: dict[bool, str] = {}
    for indent, name, body in _FENCED.findall(without_thinking(text)):
        if name.lower() in ("", "py", "python", "python3"):
            last[bool(name)] = re.sub(f"^{indent}", "", body, flags=re.MULTILINE) if indent else body
    return last.get(True, last.get(False))


def code_reward(text: str, tests: Sequence[tuple[str, str]], bounds: Bounds = Bounds()) -> float:
    """1 if the last program of the text gives the expected output for every input, else 0.

    tests: pairs of standard input and expected output, which are compared without spaces at the ends of lines and empty
    lines at the end. The first wrong output ends it. Raises SandboxError where there is no sandbox, and ValueError
    without tests.
    """
    if not tests:
        raise ValueError("tests: expected at least one pair of input and output")
    program = last_program(text)
    if program is None:
        return 0.0
    for given, expected in tests:
        outcome = run_python(program, given, bounds)
        if outcome.reason != "exit" or outcome.code != 0 or _lines(outcome.output) != _lines(expected):
            return 0.0
    return 1.0


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


@contextmanager
def _open() -> Iterator[Judge]:
    sandbox.check()
    yield lambda problem, text: code_reward(text, [tuple(pair) for pair in problem.facts["tests"]])


def _lacks(problem: Problem) -> str | None:
    tests = problem.facts.get("tests")
    pairs = isinstance(tests, list | tuple) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(side, str) for side in pair)
        for pair in tests
    )
    return None if pairs and tests else "tests: expected pairs of input and output, for the reward code"


REWARD = Reward(_open, _lacks)
