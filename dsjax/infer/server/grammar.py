"""What the next token may be: JSON by a schema (llguidance), and the end of a reasoning that takes too long."""

import functools
import json
from typing import Any

import numpy as np

from dsjax.config import ConfigError

_SOON = 10  # tokens before the end of a thinking budget from which on nothing is drafted


@functools.lru_cache(maxsize=4)
def _vocabulary(tokenizer_json: str, vocab_size: int, eos: int):
    import llguidance

    return llguidance.LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=eos)


class JsonGrammar:
    """Text that a JSON schema allows, and then the end."""

    active = True

    def __init__(self, service, schema: dict[str, Any]):
        import llguidance
        import llguidance.numpy

        tokenizer = service.tokenizer
        self._n = service.loaded.config.model.vocab_size
        vocabulary = _vocabulary(tokenizer.text.to_str(), max(self._n, tokenizer.vocab_size), tokenizer.eos_id)
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema))
        except ValueError as error:
            raise ConfigError(f"response_format: {_line(error)}") from None
        self._matcher = llguidance.LLMatcher(vocabulary, grammar)
        if problem := self._matcher.get_error():
            raise ConfigError(f"response_format: {_line(problem)}")
        self._bits = llguidance.numpy.allocate_token_bitmask(1, max(self._n, tokenizer.vocab_size))
        self._fill = llguidance.numpy.fill_next_token_bitmask

    def forbidden(self) -> np.ndarray:
        self._fill(self._matcher, self._bits)
        allowed = np.unpackbits(self._bits.view(np.uint8)[0], bitorder="little")[: self._n].astype(bool)
        return ~allowed

    def advance(self, token: int) -> None:
        self._matcher.consume_token(token)


class ThinkingBudget:
    """Ends the reasoning after so many tokens: then comes </think>, whatever the model would say."""

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

    def forbidden(self) -> np.ndarray:
        return self._first.forbidden() if not self._first.over else self._then.forbidden()

    def advance(self, token: int) -> None:
        if not self._first.over:
            self._first.advance(token)
        elif self._then is not None:
            self._then.advance(token)


def grammar_of(service, wanted) -> JsonGrammar | None:
    """Of a response_format. Raises ConfigError for a schema that cannot be followed."""
    if wanted is None or wanted.type == "text":
        return None
    return JsonGrammar(service, {"type": "object"} if wanted.type == "json_object" else wanted.json_schema["schema"])


def _line(text) -> str:
    return " ".join(str(text).split())[:300]
