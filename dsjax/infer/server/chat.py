"""/v1/chat/completions: messages in the model's template; reasoning, content and tool calls on the way back."""

import re
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from dsjax.config import ConfigError, show
from dsjax.infer.requests import Request, Sampled
from dsjax.infer.server.answer import THINK, Answer, Piece, ToolCall
from dsjax.infer.server.grammar import Both, ThinkingBudget, calls_grammar, grammar_of
from dsjax.infer.server.protocol import ChatRequest
from dsjax.infer.server.service import Service, follow_all, usage
from dsjax.infer.text import Text

_REASONING = ("reasoning_content", "reasoning", "thinking")
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass
class _Choice:
    """One sample."""

    request: Request
    text: Text
    answer: Answer
    said: list[Sampled] = field(default_factory=list)
    reason: str | None = None
    n_reasoning: int = 0


def prompt_of(service: Service, messages: list[dict[str, Any]], /, **variables) -> list[int]:
    """Token ids of a conversation, without the reasoning of earlier answers. Raises ConfigError (HubError)."""
    return service.tokenizer.encode_rendered(_rendered(service, messages, **variables))


def _rendered(service: Service, messages: list[dict[str, Any]], /, **variables) -> str:
    if service.template is None:
        raise ConfigError(f"{service.name} has no chat template: ask /v1/completions")
    plain = []
    for n, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            raise ConfigError(f"messages[{n}].role={show(message.get('role'))}: expected a text")
        message = {name: value for name, value in message.items() if name not in _REASONING}
        content = message.get("content")
        if isinstance(content, list):
            parts = [p.get("text") if isinstance(p, dict) and p.get("type") == "text" else None for p in content]
            if not all(isinstance(part, str) for part in parts):
                raise ConfigError(f"messages[{n}].content: expected parts of type text, this model reads nothing else")
            message["content"] = "".join(parts)
        elif not isinstance(content, str | None):
            raise ConfigError(f"messages[{n}].content={show(content)}: expected a text or a list of parts")
        plain.append(message)
    return service.template.render(plain, **variables)


def _choices(service: Service, body: ChatRequest) -> list[_Choice]:
    tools = None if body.tool_choice == "none" else body.tools
    only = body.tool_choice["function"].get("name") if _names_one(body.tool_choice) else None
    if only is not None:
        tools = [t for t in tools or () if t["function"]["name"] == only]
        if not tools:
            raise ConfigError(f"tool_choice: no tool of the name {show(only)} is in tools")
    if body.tool_choice == "required" and not tools:
        raise ConfigError("tool_choice=required: expected tools")
    variables = {**(body.chat_template_kwargs or {}), "tools": tools}
    rendered = _rendered(service, body.messages, **variables)
    must = body.tool_choice == "required" or only is not None
    prompt = service.tokenizer.encode_rendered(rendered)
    thinking = rendered.rstrip().endswith(THINK)
    max_tokens = body.max_completion_tokens or body.max_tokens
    n = body.majority or body.n or 1
    choices = []
    for i in range(n):
        if must:
            grammar = calls_grammar(service, tools, many=only is None and body.parallel_tool_calls is not False)
        else:
            grammar = grammar_of(service, body.response_format)
        if thinking and (body.thinking_budget is not None or grammar is not None):
            longest = service.driver.engine.longest if body.thinking_budget is None else body.thinking_budget
            end = service.tokenizer.encode_rendered("</think>\n\n")
            grammar = Both(ThinkingBudget(longest, end, service.loaded.config.model.vocab_size), grammar)
        more: dict[str, Any] = {"grammar": grammar}
        if body.logprobs:
            more["logprobs"] = body.top_logprobs or 0
        request = service.request(body, prompt, max_tokens, i, **more)
        text = Text(service.tokenizer, body.stops, keep_stop=body.include_stop_str_in_output, skip_special=False)
        choices.append(_Choice(request, text, Answer(thinking, tools=bool(tools))))
    choices[0].request.check(service.driver.engine.cfg.vocab_size, service.driver.engine.longest)
    return choices


def _names_one(choice) -> bool:
    if not isinstance(choice, dict):
        return False
    if choice.get("type") != "function" or not isinstance(choice.get("function"), dict):
        raise ConfigError(
            'tool_choice: expected none, auto, required or {"type": "function", "function": {"name": ...}}'
        )
    return True


async def whole(service: Service, body: ChatRequest) -> dict[str, Any]:
    """The answer. Raises ConfigError, Full, Closing, Failed."""
    choices = _choices(service, body)
    async with follow_all(service, [(c.request, c.text) for c in choices]) as course:
        async for n, delta in course:
            _take(choices[n], delta)
    shown = choices
    result = _head("chat.completion", service)
    if body.majority:
        best, votes = vote([c.answer.content for c in choices])
        shown, result["votes"] = [choices[best]], votes
    result["choices"] = [
        {
            "index": n,
            "message": _message(c.answer),
            "logprobs": _logprobs(service, c.said) if body.logprobs else None,
            "finish_reason": _reason(c),
        }
        for n, c in enumerate(shown)
    ]
    return result | {"usage": usage([c.request for c in choices], sum(c.n_reasoning for c in choices))}


async def stream(service: Service, body: ChatRequest) -> AsyncIterator[dict[str, Any]]:
    """The same in pieces. A vote has no pieces: its answer comes whole."""
    if body.majority:
        result = await whole(service, body)
        choice = result["choices"][0]
        message = {name: value for name, value in choice["message"].items() if value is not None}
        for n, call in enumerate(message.get("tool_calls", ())):
            call["index"] = n
        head = {**result, "object": "chat.completion.chunk", "usage": None}
        yield head | {"choices": [{"index": 0, "delta": message, "finish_reason": choice["finish_reason"]}]}
        if body.stream_options and body.stream_options.include_usage:
            yield head | {"choices": [], "usage": result["usage"]}
        return
    choices, head = _choices(service, body), _head("chat.completion.chunk", service)
    async with follow_all(service, [(c.request, c.text) for c in choices]) as course:
        for n in range(len(choices)):
            yield head | {
                "choices": [{"index": n, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]
            }
        async for n, delta in course:
            choice = choices[n]
            before = len(choice.answer.calls)
            piece = _take(choice, delta)
            shown: dict[str, Any] = {}
            if piece.reasoning:
                shown["reasoning_content"] = piece.reasoning
            if piece.content:
                shown["content"] = piece.content
            if piece.calls:
                shown["tool_calls"] = [{"index": before + i, **_call(c)} for i, c in enumerate(piece.calls)]
            said = delta.said if body.logprobs or body.want_experts else []
            if not shown and not said and choice.reason is None:
                continue
            chunk = {"index": n, "delta": shown, "finish_reason": choice.reason and _reason(choice)}
            if body.logprobs:
                chunk["logprobs"] = _logprobs(service, said)
            if body.want_experts:
                chunk["experts"] = [
                    {"token": _token(service, one), "drafted": one.drafted, "layers": one.experts.tolist()}
                    for one in said
                ]
            yield head | {"choices": [chunk]}
    if body.stream_options and body.stream_options.include_usage:
        counted = usage([c.request for c in choices], sum(c.n_reasoning for c in choices))
        yield head | {"choices": [], "usage": counted}


def _take(choice: _Choice, delta) -> Piece:
    thinking = choice.answer.thinking
    piece = choice.answer.push(delta.text)
    if choice.request.logprobs is not None:
        choice.said += delta.said
    choice.n_reasoning += len(delta.said) if thinking else 0
    if delta.reason is not None:
        choice.reason = delta.reason
        last = choice.answer.end()
        piece = Piece(piece.reasoning + last.reasoning, piece.content + last.content, piece.calls + last.calls)
    return piece


def _reason(choice: _Choice) -> str:
    return "tool_calls" if choice.answer.calls and choice.reason == "stop" else choice.reason


def _message(answer: Answer) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.content}
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.calls:
        message["tool_calls"] = [_call(call) for call in answer.calls]
        message["content"] = answer.content or None
    return message


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _token(service: Service, one: Sampled) -> str:
    return service.tokenizer.decode([one.token], skip_special=False)


def _logprobs(service: Service, said: list[Sampled]) -> dict[str, Any]:
    def entry(id: int, logprob: float | None) -> dict[str, Any]:
        token = service.tokenizer.decode([id], skip_special=False)
        return {"token": token, "logprob": logprob, "bytes": list(token.encode())}

    return {
        "content": [
            entry(one.token, one.logprob) | {"top_logprobs": [entry(*pair) for pair in one.top]} for one in said
        ]
    }


def vote(contents: list[str]) -> tuple[int, list[dict[str, Any]]]:
    """The first sample whose final answer most samples give, and all answers with their votes.

    The final answer is the last \\boxed{}, or else the last number, or else the whole text.
    """
    answers = [final_answer(content) for content in contents]
    counted = Counter(answers)
    best = max(counted, key=lambda answer: (counted[answer], -answers.index(answer)))
    return answers.index(best), [{"answer": answer, "votes": n} for answer, n in counted.most_common()]


def final_answer(text: str) -> str:
    if boxed := _BOXED.findall(text):
        return boxed[-1].strip()
    if numbers := _NUMBER.findall(text):
        return numbers[-1].replace(",", "")
    return " ".join(text.split())


def _head(kind: str, service: Service) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": service.name}
