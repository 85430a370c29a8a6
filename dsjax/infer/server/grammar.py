"""What the next token may be: JSON by a schema, calls of tools (both llguidance), the end of a reasoning too long."""

import functools
import json
from typing import Any

import numpy as np

from dsjax.config import ConfigError
from dsjax.infer.server.answer import CALL, CALLS, END_CALL, END_CALLS, SEP

_ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_V3_BEGIN, _V3_END, _BETWEEN = "\n```json\n", "\n```", "\n"
_SOON = 10  # tokens before the end of a thinking budget from which on nothing is drafted


@functools.lru_cache(maxsize=4)
def _vocabulary(tokenizer_json: str, vocab_size: int, eos: int):
    import llguidance

    return llguidance.LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=eos)


class TextGrammar:
    """Text that a grammar of llguidance allows, and then the end. Raises ConfigError that begins with `field`."""

    active = True

    def __init__(self, service, field: str, compile: str, source: str):
        import llguidance
        import llguidance.numpy

        tokenizer = service.tokenizer
        self._n = service.loaded.config.model.vocab_size
        vocabulary = _vocabulary(tokenizer.text.to_str(), max(self._n, tokenizer.vocab_size), tokenizer.eos_id)
        try:
            grammar = getattr(llguidance.LLMatcher, compile)(source)
        except ValueError as error:
            raise ConfigError(f"{field}: {_line(error)}") from None
        self._matcher = llguidance.LLMatcher(vocabulary, grammar)
        if problem := self._matcher.get_error():
            raise ConfigError(f"{field}: {_line(problem)}")
        self._bits = llguidance.numpy.allocate_token_bitmask(1, max(self._n, tokenizer.vocab_size))
        self._fill = llguidance.numpy.fill_next_token_bitmask

    def forbidden(self) -> np.ndarray:
        self._fill(self._matcher, self._bits)
        allowed = np.unpackbits(self._bits.view(np.uint8)[0], bitorder="little")[: self._n].astype(bool)
        return ~allowed

    def advance(self, token: int) -> None:
        self._matcher.consume_token(token)

    @property
    def ended(self) -> bool:
        return self._matcher.is_stopped()


class ThinkingBudget:
    """Ends the reasoning after so many tokens: then comes </think>, whatever the model would say."""

    ended = False

    def __init__(self, n_tokens: int, end: list[int], vocab_size: int):
        self._left, self._end, self._vocab_size = n_tokens, end, vocab_size
        self._forced: list[int] | None = None
        self.over = False

    @property
    def active(self) -> bool:
        """Something may be forbidden before long."""
        return not self.over and self._left <= _SOON

    def forbidden(self) -> np.ndarray:
        mask = np.zeros(self._vocab_size, bool)
        if not self.over and self._left <= 0:
            mask[:] = True
            mask[self._end[0] if self._forced is None else self._forced[0]] = False
        return mask

    def advance(self, token: int) -> None:
        if self.over:
            return
        self._left -= 1
        expected = self._end if self._forced is None else self._forced
        if token == expected[0] and len(expected) > 1:
            self._forced = expected[1:]
        elif token == expected[0]:
            self.over = True
        else:
            self._forced = None


class Both:
    """Two grammars, the second from where the first one is over."""

    def __init__(self, first: ThinkingBudget, then):
        self._first, self._then = first, then

    @property
    def active(self) -> bool:
        return self._first.active if not self._first.over else self._then is not None

    @property
    def ended(self) -> bool:
        return self._first.over and self._then is not None and self._then.ended

    def forbidden(self) -> np.ndarray:
        return self._first.forbidden() if not self._first.over else self._then.forbidden()

    def advance(self, token: int) -> None:
        if not self._first.over:
            self._first.advance(token)
        elif self._then is not None:
            self._then.advance(token)


def grammar_of(service, wanted) -> TextGrammar | None:
    """Of a response_format. Raises ConfigError for a schema that cannot be followed."""
    if wanted is None or wanted.type == "text":
        return None
    schema = {"type": "object"} if wanted.type == "json_object" else wanted.json_schema["schema"]
    return TextGrammar(service, "response_format", "grammar_from_json_schema", json.dumps(schema))


def calls_grammar(service, tools: list[dict[str, Any]], many: bool) -> TextGrammar:
    """One call of one of the tools, or as many as the model likes. Raises ConfigError for parameters that cannot be.

    In V3's format if the chat template has it, or else in V3.1's, the arguments on one line as json.dumps writes them.
    """
    begin, call, sep, end_call, end = (_marker(service, text) for text in (CALLS, CALL, SEP, END_CALL, END_CALLS))
    v3 = "```json" in service.template.source
    rules = []
    for n, tool in enumerate(tools):
        function = tool["function"]
        schema = json.dumps({"type": "object", **(function.get("parameters") or {}), "x-guidance": _ONE_LINE})
        name = function["name"]
        if v3:
            rules.append(f'tool_{n}: "function" {sep} {_text(f"{name}{_V3_BEGIN}")} %json {schema} {_text(_V3_END)}')
        else:
            rules.append(f"tool_{n}: {_text(name)} {sep} %json {schema}")
    more = f"({_text(_BETWEEN) if v3 else ''} call)*" if many else ""
    start = f"start: {begin} call {more} {end}"
    choice = f"call: {call} ({' | '.join(f'tool_{n}' for n in range(len(tools)))}) {end_call}"
    return TextGrammar(service, "tools", "grammar_from_lark", "\n".join((start, choice, *rules)))


def _marker(service, text: str) -> str:
    """A control token, or its text where the tokenizer has none of that name."""
    ids = service.tokenizer.encode_rendered(text)
    return f"<[{ids[0]}]>" if len(ids) == 1 else _text(text)


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _line(text) -> str:
    return " ".join(str(text).split())[:300]
