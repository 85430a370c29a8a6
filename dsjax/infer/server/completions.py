"""/v1/completions: prompts as text or tokens, each continued n times."""

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsjax.config import ConfigError
from dsjax.infer.requests import Request, Sampled
from dsjax.infer.server.grammar import grammar_of
from dsjax.infer.server.protocol import CompletionRequest
from dsjax.infer.server.service import Service, follow_all, usage
from dsjax.infer.text import Text


@dataclass
class _Choice:
    """One sample of one prompt."""

    request: Request
    text: Text
    echo: str
    as_tokens: bool  # the prompt's first token is the client's own, and has no logprob
    written: str = ""
    offset: int = 0  # characters that logprobs were told of
    said: list[Sampled] = field(default_factory=list)
    reason: str | None = None


def prompts_of(service: Service, body: CompletionRequest) -> list[list[int]]:
    """Token ids of each prompt. Raises ConfigError."""
    given = body.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    prompts = [service.encode(p) if isinstance(p, str) else list(p) for p in given]
    if not prompts or not all(prompts):
        raise ConfigError("prompt: expected at least one token")
    if len(prompts) * (body.n or 1) > 1024:
        raise ConfigError(f"prompt: {len(prompts)} of them, {body.n or 1} times; expected at most 1,024 samples")
    if body.suffix:
        fim = service.tokenizer.fim_ids
        if fim is None:
            raise ConfigError("suffix: this model's tokenizer has no tokens to fill in the middle")
        begin, hole, end = fim
        rest = service.encode(body.suffix)[1:]
        bos = service.tokenizer.bos_id
        prompts = [[bos, begin, *(p[1:] if p[0] == bos else p), hole, *rest, end] for p in prompts]
    return prompts


def _choices(service: Service, body: CompletionRequest) -> list[_Choice]:
    choices, prompts = [], prompts_of(service, body)
    nothing = body.max_tokens == 0  # the engine samples one token all the same; it is not shown
    as_tokens = not isinstance(body.prompt, str) and not isinstance(body.prompt[0], str)
    for prompt in prompts:
        shown = prompt if as_tokens else prompt[1:]
        echo = service.tokenizer.decode(shown, skip_special=False) if body.echo else ""
        for n in range(body.n or 1):
            more: dict[str, Any] = {"grammar": grammar_of(service, body.response_format)}
            if body.logprobs is not None:
                more |= {"logprobs": body.logprobs, "prompt_logprobs": body.logprobs if body.echo else None}
            request = service.request(body, prompt, 1 if nothing else body.max_tokens, n, **more)
            text = Text(service.tokenizer, body.stops, keep_stop=body.include_stop_str_in_output)
            choices.append(_Choice(request, text, echo, as_tokens))
    for choice in choices:  # all or none
        choice.request.check(service.driver.engine.cfg.vocab_size, service.driver.engine.longest)
    return choices


async def whole(service: Service, body: CompletionRequest) -> dict[str, Any]:
    """The answer. Raises ConfigError, Full, Closing, Failed."""
    choices = _choices(service, body)
    async with follow_all(service, [(c.request, c.text) for c in choices]) as course:
        async for n, delta in course:
            _take(choices[n], delta, body)
    shown = [_shown(service, body, n, c, c.echo + c.written, c.said, first=True) for n, c in enumerate(choices)]
    return _head(service, "text_completion") | {"choices": shown, "usage": _usage(choices, body)}


async def stream(service: Service, body: CompletionRequest) -> AsyncIterator[dict[str, Any]]:
    """The same in pieces."""
    choices = _choices(service, body)
    head = _head(service, "text_completion")
    begun = set()
    async with follow_all(service, [(c.request, c.text) for c in choices]) as course:
        async for n, delta in course:
            choice = choices[n]
            said, text = _take(choice, delta, body)
            first = n not in begun
            begun.add(n)
            text = (choice.echo if first else "") + text
            if text or said or choice.reason:
                yield head | {"choices": [_shown(service, body, n, choice, text, said, first)]}
    if body.stream_options and body.stream_options.include_usage:
        yield head | {"choices": [], "usage": _usage(choices, body)}


def _take(choice: _Choice, delta, body: CompletionRequest) -> tuple[list[Sampled], str]:
    said, text = ([], "") if body.max_tokens == 0 else (delta.said, delta.text)
    if body.logprobs is not None:
        choice.said += said
    choice.written += text
    choice.reason = delta.reason and ("length" if body.max_tokens == 0 else delta.reason)
    return said, text


def _shown(service, body, n: int, choice: _Choice, text: str, said: list[Sampled], first: bool) -> dict[str, Any]:
    shown = {"index": n, "text": text, "logprobs": None, "finish_reason": choice.reason}
    if body.logprobs is not None:
        prompt = [*[None] * choice.as_tokens, *choice.request.prompt_said] if body.echo and first else []
        shown["logprobs"] = _logprobs(service, choice, prompt, said)
    return shown


def _logprobs(service: Service, choice: _Choice, prompt: Sequence[Sampled | None], said: Sequence[Sampled]):
    decode = lambda id: service.tokenizer.decode([id], skip_special=False)  # noqa: E731
    result: dict[str, list] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for one in (*prompt, *said):
        token = decode(choice.request.prompt[0] if one is None else one.token)
        result["tokens"].append(token)
        result["token_logprobs"].append(one and one.logprob)
        top: dict[str, float] = {}
        for id, logprob in one.top if one else ():
            top.setdefault(decode(id), logprob)
        if one is not None:
            top.setdefault(token, one.logprob)
        result["top_logprobs"].append(top if one else None)
        result["text_offset"].append(choice.offset)
        choice.offset += len(token)
    return result


def _usage(choices: list[_Choice], body: CompletionRequest) -> dict[str, Any]:
    """Of all prompts."""
    n = body.n or 1
    parts = [usage([c.request for c in choices[i : i + n]]) for i in range(0, len(choices), n)]
    total = parts[0]
    for part in parts[1:]:
        total = _sum(total, part)
    if body.max_tokens == 0:
        total |= {"completion_tokens": 0, "total_tokens": total["prompt_tokens"]}
    return total


def _sum(a, b):
    return {name: _sum(a[name], b[name]) for name in a} if isinstance(a, dict) else a + b


def _head(service: Service, kind: str) -> dict[str, Any]:
    return {"id": f"cmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": service.name}
