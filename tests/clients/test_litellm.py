"""litellm, which many programs call models through."""

import asyncio
import json
import os

import pytest
from talks import NAME, SUM, TALKS, WEATHER, asked

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or its import asks a host for prices
litellm = pytest.importorskip("litellm")

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture
def options(url):
    return {
        "model": f"openai/{NAME}",
        "api_base": f"{url}/v1",
        "api_key": "key",
        "temperature": 0.0,
        "timeout": 60,
        "num_retries": 0,
    }


def says(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def test_a_completion_and_its_stream(options):
    whole = litellm.completion(messages=says("Hello"), **options)
    assert whole.choices[0].message.content == "Hello there." and whole.choices[0].finish_reason == "stop"
    pieces = [
        *litellm.completion(messages=says("Hello"), stream=True, stream_options={"include_usage": True}, **options)
    ]
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == "Hello there."
    usage = next(p.usage for p in pieces if getattr(p, "usage", None))
    assert usage.prompt_tokens == whole.usage.prompt_tokens
    assert usage.completion_tokens == whole.usage.completion_tokens > 1


def test_several_at_once(options):
    async def go():
        whole = [litellm.acompletion(messages=says(question), **options) for question in [*TALKS][:2] * 3]
        course = await litellm.acompletion(messages=says("Hello"), stream=True, **options)
        streamed = "".join([piece.choices[0].delta.content or "" async for piece in course])
        return [answer.choices[0].message.content for answer in await asyncio.gather(*whole)], streamed

    assert asyncio.run(go()) == (["Hello there.", "It is 2."] * 3, "Hello there.")


def test_reasoning_and_calls_of_tools(options):
    message = litellm.completion(messages=says(SUM), **options).choices[0].message
    assert message.reasoning_content.strip() == "One and one are two." and message.content == "It is 2."
    choice = litellm.completion(messages=says(WEATHER), tools=[TOOL], **options).choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and call.function.name == "weather"
    assert json.loads(call.function.arguments) == {"city": "Oslo"}


def test_plain_texts(options):
    got = litellm.text_completion(
        prompt=asked("Hello"), max_tokens=20, **options | {"model": f"text-completion-openai/{NAME}"}
    )
    assert got.choices[0].text == "Hello there."


def test_errors_are_litellms_own_kinds(options):
    with pytest.raises(litellm.NotFoundError, match="gpt-4"):
        litellm.completion(messages=says("Hello"), **options | {"model": "openai/gpt-4"})
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(messages=says("Hello"), **options | {"temperature": 9.0})
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(messages=says("Hello"), **options | {"api_key": "other"})
