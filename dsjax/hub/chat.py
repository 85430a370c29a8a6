"""Messages as the text that a model was trained on: the chat template of a Hub folder, rendered as transformers does.

ChatTemplate.load(folder).render([{"role": "user", "content": "Hello"}])
"""

import json
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dsjax.config import ConfigError, show
from dsjax.data.tokenizer import special_tokens
from dsjax.hub.files import HubError, read_json

TEMPLATE, CONFIG = "chat_template.jinja", "tokenizer_config.json"
_MARKS = "\ufdd0", "\ufdd1"  # no characters, by Unicode's definition: what stands for both ends of {% generation %}
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one field; templates read the first two


class ChatTemplate:
    """A chat template: its source, the file it is from, and the special tokens by name ("bos_token").

    Raises HubError for a syntax error.
    """

    def __init__(self, source: str, where: str = "chat template", tokens: Mapping[str, str] | None = None):
        self.source, self.where, self.tokens = source, where, dict(tokens or {})
        self.marks = re.search(r"{%[-+]?\s*generation\b", source) is not None  # whether it says what a model writes
        sandbox = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        sandbox.filters["tojson"] = _tojson
        sandbox.globals["raise_exception"] = _raise
        sandbox.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
        try:
            self._template = sandbox.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise HubError(f"{where}: line {error.lineno}: {_line(error.message)}") from None
        except Exception as error:  # nested too deep, and the like
            raise HubError(f"{where}: no template: {type(error).__name__}: {_line(error)}") from None

    @classmethod
    def load(cls, folder: Path | str) -> "ChatTemplate":
        """The template of a Hub folder. Raises HubError where there is none, or where it is damaged."""
        folder = Path(folder)
        source, where = _find(folder)
        try:
            return cls(source, where, special_tokens(folder))
        except HubError:
            raise
        except ConfigError as error:
            raise HubError(str(error)) from None

    def render(self, messages: list[dict[str, Any]], /, *, add_generation_prompt: bool = True, **variables) -> str:
        """The text of a conversation, with the start of the assistant's turn at its end.

        Variables (tools, documents, thinking, ...) are the template's own; those that are special tokens replace them.
        Raises HubError for messages that are none or that the template does not take, and for what the sandbox forbids.
        """
        return self._render(messages, False, add_generation_prompt, variables)

    def render_marked(self, messages: list[dict[str, Any]], /, **variables) -> list[tuple[str, bool]]:
        """The text of a whole conversation in pieces, and of each whether it is inside {% generation %}.

        Raises HubError as `render` does, and where the template makes other text of the pieces.
        """
        text = self._render(messages, True, False, variables)
        pieces = re.split("([\ufdd0\ufdd1])", text)
        marks = pieces[1::2]
        whole = self.render(messages, add_generation_prompt=False, **variables)
        if "".join(pieces[::2]) != whole or marks != [*_MARKS] * (len(marks) // 2):
            raise HubError(f"{self.where}: what is between {{% generation %}} and its end cannot be told in the text")
        return [(piece, bool(i % 2)) for i, piece in enumerate(pieces[::2])]

    def _render(self, messages, mark: bool, add_generation_prompt: bool, variables: dict[str, Any]) -> str:
        given = {"tools": None, "documents": None, **self.tokens, **variables}
        given = {name: _plain(value) for name, value in given.items()} | {_Generation.variable: mark}
        values = given | {"messages": _checked(messages), "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(values)
        except _Refused as error:
            raise HubError(f"{self.where} refuses these messages: {_line(error)}") from None
        except jinja2.exceptions.SecurityError as error:
            raise HubError(f"{self.where} does what no chat template should: {_line(error)}") from None
        except Exception as error:  # a template can raise anything
            raise HubError(f"{self.where} fails on these messages: {type(error).__name__}: {_line(error)}") from None


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %} around what a model wrote: only text, or between _MARKS if asked for."""

    tags = {"generation"}  # noqa: RUF012
    variable = "_mark_generation"

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marked = jinja2.nodes.Name(self.variable, "load", lineno=line)
        return jinja2.nodes.CallBlock(self.call_method("_body", [marked]), [], [], body).set_lineno(line)

    def _body(self, marked, caller):
        begin, end = _MARKS if marked is True else ("", "")
        return begin + caller() + end


class _Refused(jinja2.TemplateError):
    """What a template raises by itself."""


def _raise(message):
    raise _Refused(str(message))


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def has_template(folder: Path | str) -> bool:
    """Whether `load` finds a template there. Raises HubError for a damaged tokenizer_config.json."""
    path = Path(folder) / CONFIG
    if (Path(folder) / TEMPLATE).is_file():
        return True
    return path.is_file() and read_json(str(path), path.read_bytes()).get("chat_template") is not None


def _find(folder: Path) -> tuple[str, str]:
    """The template's source and where it is from."""
    if not folder.is_dir():
        raise HubError(f"{folder}: no such folder")
    path = folder / TEMPLATE
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8"), str(path)
        except UnicodeDecodeError as error:
            raise HubError(f"{path}: not UTF-8: {error}") from None
    path = folder / CONFIG
    given = read_json(str(path), path.read_bytes()).get("chat_template") if path.is_file() else None
    where = f"{path}: chat_template"
    if given is None:
        raise HubError(f"{folder}: no chat template; looked for {TEMPLATE}, and for chat_template in {CONFIG}")
    if isinstance(given, str):
        return given, where
    if not isinstance(given, list) or not all(isinstance(e, dict) and isinstance(e.get("name"), str) for e in given):
        raise HubError(f"{where}={show(given)}: expected a text, or a list of name and template")
    named = {entry["name"]: entry.get("template") for entry in given}
    if not isinstance(named.get("default"), str):
        raise HubError(f"{where}: no template named default; there are {show(list(named))}")
    return named["default"], where


def _checked(messages) -> list[dict[str, Any]]:
    """Messages as templates expect them. Raises HubError."""
    expected = 'expected {"role": ..., "content": ...}'
    if not isinstance(messages, list | tuple) or not messages:
        raise HubError(f"messages={show(messages)}: expected a list of one or more, each of them {expected[9:]}")
    checked = []
    for i, message in enumerate(messages):
        good = isinstance(message, Mapping) and isinstance(message.get("role"), str)
        if not good or ("content" not in message and not message.get("tool_calls")):
            raise HubError(f"messages[{i}]={show(message)}: {expected}")
        if not isinstance(message.get("content"), str | list | tuple | None):
            raise HubError(f"messages[{i}].content={show(message['content'])}: expected a text, or a list of parts")
        # Programs send tool_calls=None and the like, and templates ask whether the name is there. Of content,
        # DeepSeek's templates ask whether it is none.
        message = {name: _plain(value) for name, value in message.items() if value is not None}
        message.setdefault("content", None)
        reasoning = next((message[name] for name in REASONING if name in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        checked.append(message)
    return checked


def _plain(value):
    """The value out of JSON's types alone, so that a template has no other object's methods in its hands."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return str.__str__(value)
    for kind in (bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    return None if value is None else f"<{type(value).__name__}>"


def _line(text) -> str:
    return show(" ".join(str(text).split()), quote=False) or "no reason given"
