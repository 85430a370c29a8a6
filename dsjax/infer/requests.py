"""What is asked of the engine, and what it says of it."""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from dsjax.config import ConfigError, show
from dsjax.infer.sampling import TOP_LOGPROBS

_numbers = itertools.count()


@runtime_checkable
class Grammar(Protocol):
    """What the next token may be, for one request."""

    active: bool  # something is forbidden, or may be within a few tokens; then nothing is drafted
    ended: bool  # the text is whole, and nothing can follow

    def forbidden(self) -> np.ndarray:
        """[V] bool."""

    def advance(self, token: int) -> None:
        """Tells of the token that came."""


@dataclass(frozen=True)
class Sampled:
    """A token that was generated."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # the likeliest (token, logprob), falling
    drafted: bool = False  # it was a draft that was accepted
    experts: np.ndarray | None = None  # [expert layers, K] int32 of the token before it


@dataclass(eq=False)
class Request:
    """A prompt and how to continue it. `tell` is called, on the engine's thread, with each batch of new tokens; if it
    returns True, the request ends there. `done` is called once, with why it ended.

    Reasons: "stop" (an end token, or tell), "length", "cancelled", "error: ...".
    """

    prompt: Sequence[int]
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    keep_experts: bool = False  # of the prompt's tokens, in prompt_experts
    grammar: Grammar | None = None
    tell: Callable[[list[Sampled]], bool | None] = lambda tokens: None
    done: Callable[[str], None] = lambda reason: None
    id: int = field(default_factory=lambda: next(_numbers))

    # What the engine knows of it.
    arrived: float = field(default_factory=time.monotonic)
    tokens: list[int] = field(default_factory=list)  # prompt and text
    chunks: list[bytes] = field(default_factory=list)  # names of the prompt's whole chunks
    length: int = 0  # tokens in the cache
    pages: list[int] = field(default_factory=list)
    kept: Any = None  # what its pages held, on the host, while it has none
    kept_pages: int = 0
    drafts: list[int] = field(default_factory=list)
    shard: int = 0
    n_cached: int = 0  # tokens of the prompt that were in the cache already
    prompt_said: list[Sampled | None] = field(default_factory=list)  # logprobs of the prompt's tokens
    prompt_experts: np.ndarray | None = None  # [expert layers, tokens, K] int32 of the prompt; -1: not known
    n_drafted: int = 0
    n_accepted: int = 0

    @property
    def n_new(self) -> int:
        return len(self.tokens) - len(self.prompt)

    @property
    def prefilled(self) -> bool:
        """Its prompt is in the cache, and a token behind it known."""
        return len(self.tokens) > len(self.prompt)

    @property
    def shaped(self) -> bool:
        """Something is added to its logits."""
        penalised = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        early = self.n_new < self.min_tokens and self.stop_ids
        return bool(penalised or self.logit_bias or (self.grammar is not None and self.grammar.active) or early)

    def check(self, vocab_size: int, longest: int) -> None:
        """Raises ConfigError for what cannot be done with a model of this vocabulary and length."""
        if not self.prompt:
            raise ConfigError("prompt: expected at least one token")
        for token in self.prompt:
            if not 0 <= token < vocab_size:
                raise ConfigError(f"prompt: token {token}; expected 0 to {vocab_size - 1}")
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens={self.max_tokens}: expected a whole number greater than 0")
        if len(self.prompt) + self.max_tokens > longest:
            raise ConfigError(
                f"max_tokens={self.max_tokens}: expected at most {max(0, longest - len(self.prompt))} after a prompt "
                f"of {len(self.prompt)} tokens, as there is room for {longest}"
            )
        for token in self.stop_ids:
            if not 0 <= token < vocab_size:
                raise ConfigError(f"stop_token_ids: {token}; expected 0 to {vocab_size - 1}")
        ranges = {
            "temperature": (0, 100), "top_p": (0, 1), "min_p": (0, 1), "presence_penalty": (-2, 2),
            "frequency_penalty": (-2, 2), "repetition_penalty": (0.01, 100), "top_k": (0, 1 << 31),
            "seed": (0, 1 << 32), "logprobs": (0, TOP_LOGPROBS), "prompt_logprobs": (0, TOP_LOGPROBS),
        }  # fmt: skip
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # NaN is in no range
                raise ConfigError(f"{name}={show(value)}: expected {low} to {high}")
        for token, bias in self.logit_bias.items():
            if not 0 <= token < vocab_size or not -100 <= bias <= 100:
                raise ConfigError(
                    f"logit_bias={{{token}: {bias}}}: expected a token below {vocab_size} and -100 to 100"
                )
