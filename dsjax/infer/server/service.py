"""From what a client asks to requests of the engine, and from tokens to text on its way back."""

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsjax.config import ConfigError, ServerConfig
from dsjax.data.tokenizer import Tokenizer
from dsjax.hub.chat import ChatTemplate
from dsjax.hub.files import HubError
from dsjax.hub.load import Loaded
from dsjax.infer.requests import Request, Sampled
from dsjax.infer.server.driver import Driver
from dsjax.infer.server.metrics import Metrics
from dsjax.infer.text import Text

_SEEDS_APART = 0x9E3779B9  # of the samples of one request


class Failed(Exception):
    """The engine could not do it."""


@dataclass
class Service:
    """A model, its engine, and how it is offered."""

    loaded: Loaded
    driver: Driver
    config: ServerConfig
    name: str
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self):
        self.tokenizer: Tokenizer = self.loaded.tokenizer
        try:
            self.template: ChatTemplate | None = ChatTemplate.load(self.loaded.folder)
        except HubError:
            self.template = None
        self.defaults = _generation_defaults(self.loaded.folder)
        self.metrics = Metrics(self.driver)

    def encode(self, text: str) -> list[int]:
        """A prompt as text: what a document begins with, and its tokens. Raises ConfigError for what is no Unicode."""
        return [self.tokenizer.bos_id, *self.tokenizer.encode(_unicode(text))]

    def encode_whole(self, text: str) -> list[int]:
        """A text in which control tokens count, such as a rendered conversation; nothing is added."""
        return self.tokenizer.encode_rendered(_unicode(text))

    def request(self, body, prompt: Sequence[int], max_tokens: int | None, n: int = 0, **more) -> Request:
        """The n-th sample of what a body asks. Raises ConfigError."""
        longest = self.driver.engine.longest
        if len(prompt) >= longest:
            raise ConfigError(
                f"the prompt has {len(prompt):,} tokens; this model takes {longest - 1:,} and one new one"
            )
        seed = secrets.randbits(32) if body.seed is None else body.seed % (1 << 32)
        given = {
            name: getattr(body, name)
            for name in ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty")
            if getattr(body, name) is not None
        }
        if body.repetition_penalty is not None:
            given["repetition_penalty"] = body.repetition_penalty
        given["top_k"] = max(0, given.get("top_k", 0))
        most = self.loaded.config.model.vocab_size
        if bad := [t for t in body.stop_token_ids or () if t >= most]:
            raise ConfigError(f"stop_token_ids: {bad[0]}; expected below {most}")
        stop_ids = () if body.ignore_eos else self.tokenizer.eos_ids
        return Request(
            list(prompt),
            max_tokens=longest - len(prompt) if max_tokens is None else max_tokens,
            seed=(seed + n * _SEEDS_APART) % (1 << 32),
            logit_bias=body.logit_bias or {},
            stop_ids=(*stop_ids, *(body.stop_token_ids or ())),
            min_tokens=body.min_tokens,
            **self.defaults | given | more,
        )


@dataclass
class Delta:
    """What more there is of a sample."""

    text: str
    said: list[Sampled]
    reason: str | None = None  # "stop" or "length", with the last


async def follow(service: Service, request: Request, text: Text) -> AsyncIterator[Delta]:
    """A request's text as it comes; closing it cancels the request. Raises Failed, Full, Closing, ConfigError."""
    pieces = text.follow(request)
    service.metrics.began(request)
    async with contextlib.aclosing(service.driver.generate(request)) as course:
        async for item in course:
            if not isinstance(item, str):
                yield Delta(pieces.popleft(), item)
                continue
            if item not in ("stop", "length"):
                raise Failed(item)
            yield Delta(text.end(), [], "stop" if text.stopped is not None else item)


async def follow_all(service: Service, todo: Sequence[tuple[Request, Text]]) -> AsyncIterator[tuple[int, Delta]]:
    """Several at once: (which, what more)."""
    came: asyncio.Queue = asyncio.Queue()

    async def one(n: int, request: Request, text: Text) -> None:
        try:
            async with contextlib.aclosing(follow(service, request, text)) as course:
                async for delta in course:
                    came.put_nowait((n, delta))
        except Exception as error:
            came.put_nowait(error)

    tasks = [asyncio.create_task(one(n, *pair)) for n, pair in enumerate(todo)]
    try:
        left = len(tasks)
        while left:
            item = await came.get()
            if isinstance(item, Exception):
                raise item
            left -= item[1].reason is not None
            yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def usage(requests: Sequence[Request], n_reasoning: int | None = None) -> dict[str, Any]:
    """Tokens of the samples of one prompt, as OpenAI counts them."""
    prompt, new = len(requests[0].prompt), sum(r.n_new for r in requests)
    details = {
        "accepted_prediction_tokens": sum(r.n_accepted for r in requests),
        "rejected_prediction_tokens": sum(r.n_drafted - r.n_accepted for r in requests),
    }
    if n_reasoning is not None:
        details["reasoning_tokens"] = n_reasoning
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": max(r.n_cached for r in requests)},
        "completion_tokens_details": details,
    }


def _unicode(text: str) -> str:
    """The text. Raises ConfigError where half a surrogate pair is no character of it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"the prompt is no Unicode text: character {error.start} is half a surrogate pair") from None
    return text


def _generation_defaults(folder) -> dict[str, float]:
    """What the model's own generation_config.json recommends."""
    try:
        given = json.loads((folder / "generation_config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    names = {"temperature": (0, 2), "top_p": (0, 1), "top_k": (0, 1 << 20), "min_p": (0, 1)}
    return {
        name: given[name]
        for name, (low, high) in names.items()
        if isinstance(given, dict) and isinstance(given.get(name), int | float) and low <= given[name] <= high
    }
