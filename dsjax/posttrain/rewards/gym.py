"""Reward as a reasoning-gym data set scores an answer, in worker processes.

Some of its data sets evaluate what the model wrote, as Python (string_insertion, n_queens) or by sympy, whose parser is
Python's as well (countdown, simple_integration). In a worker only literals, arithmetic and mathematical functions are
let through; what takes too long is worth nothing.
"""

import ast
import contextlib
import functools
import importlib.util
import io
import os
import pickle
import re
import resource
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from dsjax.config import ConfigError
from dsjax.posttrain.problem import Judge, Problem, Reward
from dsjax.posttrain.rewards.answer import given_answer
from dsjax.posttrain.rewards.workers import Workers

_LONGEST = 20_000  # characters of an answer that is scored
_SECONDS = 10.0
_OPERATORS = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop, ast.expr_context)
_LITERAL = (*_OPERATORS, ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Dict)
_HIDES = re.compile(r"[#_]|\d[a-zA-Z]")  # 0x1f, 3e2 and comments: numbers where data sets count digits by a pattern
_FUNCTIONS = frozenset((
    "sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh",
    "exp", "log", "ln", "sqrt", "Abs", "pi",
))  # fmt: skip


def check() -> None:
    """Raises ConfigError where reasoning-gym is not installed."""
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ConfigError("gym: needs reasoning-gym, which is not here: pip install 'dsjax[gym]'")


def make_dataset(name: str, options: Mapping[str, Any]):
    """A reasoning-gym data set, which says nothing while it is made."""
    import reasoning_gym

    with contextlib.redirect_stdout(io.StringIO()):
        return reasoning_gym.create_dataset(name, **options)


class Scorers(Workers):
    """reasoning-gym in n processes. To be used as a context; `score` may be called from several threads."""

    def __init__(self, n: int = 2, seconds: float = _SECONDS):
        super().__init__(_work, n, seconds)

    def score(self, name: str, options: Mapping[str, Any], entry: Mapping[str, Any], answer: str) -> float:
        """0 to 1; 0 for what takes longer than `seconds`, and for what the data set fails on."""
        if len(answer) > _LONGEST:
            return 0.0
        # Pickled, for JSON has no tuples, and scores differ then. We alone write it, and a worker's word is a number.
        said = self.ask(pickle.dumps((pickle.dumps((name, dict(options))), dict(entry), answer)))
        score = float(said or 0)
        return min(1.0, score) if score > 0 else 0.0  # NaN too


def only_literals(evaluate: Callable) -> Callable:
    """`eval` for literals and arithmetic; ValueError for anything else."""
    return _only(_literal, evaluate)


def only_mathematics(evaluate: Callable) -> Callable:
    """sympy's `parse_expr` for numbers, short names and mathematical functions; ValueError for anything else."""
    return _only(_mathematical, evaluate, _HIDES)


def only_arithmetic(evaluate: Callable) -> Callable:
    """sympy's `parse_expr` for decimal numbers alone: where they are counted, x/x is one too many."""
    return _only(_arithmetic, evaluate, _HIDES)


def _only(allowed: Callable[[ast.AST], bool], evaluate: Callable, refused: re.Pattern | None = None) -> Callable:
    @functools.wraps(evaluate)
    def guarded(text, *args, **kwargs):
        if not isinstance(text, str) or (refused is not None and refused.search(text)):
            raise ValueError(f"{evaluate.__name__} of what it is not for")
        if not all(map(allowed, ast.walk(ast.parse(text.strip(), mode="eval")))):
            raise ValueError(f"{evaluate.__name__} of more than it is for")
        return evaluate(text.strip(), *args, **kwargs)

    return guarded


def _literal(node: ast.AST) -> bool:
    return isinstance(node, _LITERAL)


def _arithmetic(node: ast.AST) -> bool:
    return (isinstance(node, ast.Constant) and isinstance(node.value, int | float)) or isinstance(node, _OPERATORS)


def _mathematical(node: ast.AST) -> bool:
    match node:
        case ast.Name(name):
            return name in _FUNCTIONS or (len(name) <= 2 and name.isalpha())
        case ast.Call(ast.Name(name), _, []):
            return name in _FUNCTIONS
    return _arithmetic(node)


def _guard() -> None:
    """Every place in this process where reasoning-gym or sympy would evaluate a text."""
    import sympy.parsing.sympy_parser
    import sympy.physics.units  # it parses names when `simplify` imports it

    parse = sympy.parsing.sympy_parser.parse_expr
    for name, module in list(sys.modules.items()):
        known = vars(module)
        if known.get("parse_expr") is parse:
            games = name.startswith("reasoning_gym.games.")  # countdown, puzzle24
            module.parse_expr = (only_arithmetic if games else only_mathematics)(parse)
        if name.partition(".")[0] == "reasoning_gym":
            module.eval = only_literals(eval)
            module.exec = only_literals(exec)


def _work(pipe: Connection) -> None:
    import reasoning_gym  # noqa: F401

    _guard()
    warnings.simplefilter("ignore")  # of Python's parser, on what the model wrote
    make = functools.lru_cache(16)(lambda which: make_dataset(*pickle.loads(which)))
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # it has nothing to write
        pipe.send_bytes(b"ready")
        while True:
            try:
                which, entry, answer = pickle.loads(pipe.recv_bytes())
            except EOFError:
                return
            try:
                score = float(make(which).score_answer(answer, entry))
            except Exception:  # a data set may fail in any way on what it does not expect
                score = 0.0
            pipe.send_bytes(str(score).encode())


@contextmanager
def _open() -> Iterator[Judge]:
    check()
    with Scorers() as scorers:

        def judge(problem: Problem, text: str) -> float:
            answer = given_answer(text)
            name, options = problem.facts["gym"]
            return 0.0 if answer is None else scorers.score(name, options, problem.facts["entry"], answer)

        yield judge


def _lacks(problem: Problem) -> str | None:
    missing = next((name for name in ("entry", "gym") if name not in problem.facts), None)
    return missing and f"{missing}: expected a problem of gym:NAME, for the reward gym"


REWARD = Reward(_open, _lacks)
