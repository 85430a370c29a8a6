"""Templates that others wrote, run within bounds: what they may touch, for how long, and how much text they may make.

jinja2's sandbox keeps a template from Python's insides and from `range` of more than 100,000, and bounds nothing else:
nested loops run for ever, and 'x' * 10**10 fills the memory. Here each turn of a loop, each call and each filter looks
at the clock, and each text made is counted, before it is made where one step can make it large. One step is not
interrupted: a template whose author means harm can still find a slow one, such as == of lists nested in lists.
"""

import functools
import re
import time
from collections.abc import Callable

from jinja2 import Environment, nodes
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import SecurityError
from jinja2.nodes import EvalContext
from jinja2.runtime import Context
from jinja2.sandbox import MAX_RANGE, ImmutableSandboxedEnvironment

SECONDS = 10
CHARACTERS = 300_000_000  # all that one rendering makes: 500 times a conversation of 128k tokens
LARGEST = 2**4096
# Methods and filters of a text that can make it longer.
_GROWING = {"center", "ljust", "rjust", "zfill", "expandtabs", "replace", "join", "format", "format_map", "translate"}
_GROWING |= {"indent", "wordwrap", "batch", "slice", "tojson", "string", "pprint", "xmlattr", "urlize"}


class _Code(CodeGenerator):
    """jinja2's Python code, with a look at the clock in each turn of a loop, and `~` as a call."""

    def visit_For(self, node, frame):
        node.body.insert(0, nodes.ExprStmt(nodes.Call(nodes.EnvironmentAttribute("check_time"), [], [], None, None)))
        super().visit_For(node, frame)

    def visit_Concat(self, node, frame):
        self.write("environment.concatenate(")
        self.visit(nodes.Tuple(node.nodes, "load"), frame)
        self.write(")")

    def _output_child_to_const(self, node, frame, finalize):
        if not isinstance(node, nodes.TemplateData):
            raise nodes.Impossible  # or it would run while the template is compiled
        return super()._output_child_to_const(node, frame, finalize)


class Sandbox(ImmutableSandboxedEnvironment):
    """An environment for one rendering at a time; `start` begins it. Raises SecurityError past a bound."""

    code_generator_class = _Code
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options):
        super().__init__(optimized=False, finalize=self._output, **options)
        del self.globals["lipsum"]  # makes text of any length
        self.filters = {name: self.metered(name, function) for name, function in self.filters.items()}
        self.start()

    def start(self) -> None:
        self.deadline = time.monotonic() + SECONDS
        self.left = CHARACTERS

    def check_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise SecurityError(f"it runs for more than {SECONDS} s")

    def concatenate(self, values: tuple) -> str:
        return self._spend("".join(map(self._text, values)))

    def call(self, context, function, /, *args, **kwargs):
        method = getattr(function, "__wrapped__", function)  # jinja2 wraps format
        bound_to = getattr(method, "__self__", None)
        if isinstance(bound_to, str):
            values = (bound_to, *args, *kwargs.values())
            self._foresee(method.__name__, values[::-1] if method.__name__ == "join" else values)
        self.check_time()
        return self._spend(super().call(context, function, *args, **kwargs))

    def call_binop(self, context, operator, left, right):
        if operator == "**" and _whole(left) and _whole(right) and left.bit_length() * right > LARGEST.bit_length():
            raise SecurityError("it makes a number of more than 4096 bits")
        if operator == "*" and _whole(left) != _whole(right):
            self._within((_size(left) if _whole(right) else left) * (_size(right) if _whole(left) else right))
        if operator == "%" and isinstance(left, str):
            self._foresee("format", (left, *right) if isinstance(right, tuple) else (left, right))
        return self._spend(super().call_binop(context, operator, left, right))

    def metered(self, name: str, function: Callable) -> Callable:
        @functools.wraps(function)  # with the mark that asks for the context or the environment
        def filtered(*args, **kwargs):
            self.check_time()
            self._foresee(name, (*args, *kwargs.values()))
            return self._spend(function(*args, **kwargs))

        return filtered

    def _output(self, value):
        return self._spend(self._text(value))

    def _text(self, value) -> str:
        if isinstance(value, str):
            return value
        self._within(_size(value))
        return str(value)

    def _foresee(self, name: str, values: tuple) -> None:
        if name in _GROWING:
            self._within(_most(name, [v for v in values if not isinstance(v, Context | EvalContext | Environment)]))

    def _spend(self, value):
        self.left -= len(value) if isinstance(value, str) else 8 * len(value) if isinstance(value, list) else 0
        self._within(0)
        if _whole(value) and abs(value) > LARGEST:
            raise SecurityError("it makes a number of more than 4096 bits")
        return value

    def _within(self, n: int) -> None:
        if n > self.left:
            raise SecurityError(f"it makes more than {CHARACTERS} characters")


def _whole(value) -> bool:
    return isinstance(value, int)


def _most(name: str, values: list) -> int:
    """At most how many characters a method or filter of a text makes, roughly."""
    text, *others = values
    sizes = [value if _whole(value) else _size(value) for value in others]
    if name in ("format", "format_map"):
        text = str(text)
        widths = [int(digits[:20]) for digits in re.findall(r"\d{5,}", text)]
        if re.search(r"\*|\{[^{}]*\{", text):  # widths that are values: "%*d" and "{:>{n}}"
            widths += _numbers(others)
        return len(text) + (text.count("%") + text.count("{")) * max([*map(_size, others), *widths], default=0)
    if name == "replace" and len(others) > 1 and isinstance(text, str) and isinstance(others[0], str):
        return len(text) + text.count(others[0]) * sizes[1]
    if name == "join":
        n = len(text) if isinstance(text, str | list | tuple | dict) else MAX_RANGE
        return _size(text) + n * (sizes[0] if others and others[0] else 0)
    return _size(text) * max([*sizes, 1])


def _size(value, limit: int = CHARACTERS) -> int:
    """At most how many characters the value is long, roughly; what is above the limit is not counted to its end."""
    if isinstance(value, str):
        return len(value)
    if not isinstance(value, list | tuple | dict):
        return 8
    size = 1000  # so that lists in lists in lists are not counted for long
    for item in value.items() if isinstance(value, dict) else value:
        if size > limit:
            break
        size += _size(item, limit - size)
    return size


def _numbers(value) -> list[int]:
    """The numbers of a value and of what it holds, to a depth of three."""
    found = [value]
    for _ in range(3):
        found += [item for v in found if isinstance(v, dict) for item in v.values()]
        found = [item for v in found for item in (v if isinstance(v, list | tuple) else [v])]
    return [number for number in found if _whole(number)]
