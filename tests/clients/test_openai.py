"""OpenAI's own package, sync and async."""

import asyncio
import json
from typing import Literal

import numpy as np
import openai
import pydantic
import pytest
from talks import CALL, NAME, SUM, TALKS, WEATHER, asked

pytestmark = pytest.mark.slow  # a model is taught and served first
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": DIGIT, "b": DIGIT},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0, timeout=60)


@pytest.fixture
def chat(client):
    def ask(question, **options):
        messages = question if isinstance(question, list) else [{"role": "user", "content": question}]
        return client.chat.completions.create(model=NAME, messages=messages, **{"temperature": 0.0} | options)

    return ask


def test_an_answer_is_what_the_model_was_taught(chat, client, loaded):
    answer = chat("Hello")
    assert answer.choices[0].message.content == "Hello there." and answer.choices[0].finish_reason == "stop"
    encode = loaded.tokenizer.encode
    assert answer.usage.prompt_tokens == len(encode(asked("Hello"))), answer.usage
    assert answer.usage.completion_tokens == len(encode("Hello there.")) + 1
    text = client.completions.create(model=NAME, prompt=asked("Hello"), temperature=0.0)
    assert text.choices[0].text == "Hello there." and text.usage.prompt_tokens == answer.usage.prompt_tokens + 1
    assert [m.id for m in client.models.list()] == [client.models.retrieve(NAME).id] == [NAME]


def test_a_stream_is_the_answer_in_pieces_with_its_usage(chat, client):
    whole = chat("Hello")
    pieces = list(chat("Hello", stream=True, stream_options={"include_usage": True}))
    assert "".join(p.choices[0].delta.content or "" for p in pieces[:-1]) == "Hello there."
    assert sum(bool(p.choices[0].delta.content) for p in pieces[:-1]) > 1
    assert pieces[0].choices[0].delta.role == "assistant" and pieces[-2].choices[0].finish_reason == "stop"
    assert pieces[-1].choices == [] and pieces[-1].usage.total_tokens == whole.usage.total_tokens
    with client.chat.completions.stream(
        model=NAME, messages=[{"role": "user", "content": "Hello"}], temperature=0.0
    ) as stream:
        assert stream.get_final_completion().choices[0].message.content == "Hello there."


def test_many_at_once_get_each_their_own(url):
    async def go():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0, timeout=60) as client:

            async def whole(question):
                messages = [{"role": "user", "content": question}]
                answer = await client.chat.completions.create(model=NAME, messages=messages, temperature=0.0)
                return answer.choices[0].message.content

            async def pieces(question):
                course = await client.completions.create(
                    model=NAME, prompt=asked(question), temperature=0.0, max_tokens=64, stream=True
                )
                return "".join([piece.choices[0].text async for piece in course])

            return await asyncio.gather(*(ask(q) for ask in (whole, pieces) for q in [*TALKS] * 3))

    got = asyncio.run(go())
    chats = ["Hello there.", "It is 2.", CALL, "It rains in Oslo."]
    assert got == chats * 3 + [*TALKS.values()] * 3


def test_logprobs_are_the_forward_passes(chat, client, loaded, logprobs):
    encode = loaded.tokenizer.encode
    content = chat("Hello", logprobs=True, top_logprobs=3).choices[0].logprobs.content
    ids = [*encode(asked("Hello")), *encode("Hello there."), loaded.tokenizer.eos_id]
    np.testing.assert_allclose([one.logprob for one in content], logprobs(ids)[-len(content) :], atol=2e-4)
    assert "".join(one.token for one in content[:-1]) == "Hello there."
    assert all(one.top_logprobs[0].logprob == one.logprob and len(one.top_logprobs) == 3 for one in content)
    ids = [loaded.tokenizer.bos_id, *encode("user: Goodbye")]
    echo = client.completions.create(model=NAME, prompt=ids, max_tokens=0, echo=True, logprobs=1).choices[0]
    assert echo.logprobs.token_logprobs[0] is None
    np.testing.assert_allclose(echo.logprobs.token_logprobs[1:], logprobs(ids), atol=2e-4)


def test_samples_differ_and_a_seed_repeats_them(chat):
    one, again, other = (
        [c.message.content for c in chat("Zebra?", n=3, temperature=2.0, seed=seed, max_tokens=20).choices]
        for seed in (1, 1, 2)
    )
    assert one == again and len({*one, *other}) == 6


def test_a_stop_string_is_left_out(chat):
    answer = chat("Hello", stop=["there"]).choices[0]
    assert answer.message.content == "Hello " and answer.finish_reason == "stop"
    assert chat("Hello", max_completion_tokens=1).choices[0].finish_reason == "length"


def test_reasoning_comes_apart(chat):
    answer = chat(SUM)
    message = answer.choices[0].message
    assert message.reasoning_content.strip() == "One and one are two." and message.content == "It is 2."
    assert answer.usage.completion_tokens_details.reasoning_tokens > 3
    deltas = [chunk.choices[0].delta for chunk in chat(SUM, stream=True)]
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == message.reasoning_content
    assert "".join(d.content or "" for d in deltas) == message.content


def test_a_tool_is_called_and_its_result_read(chat):
    answer = chat(WEATHER, tools=[ADD, TOOL]).choices[0]
    (call,) = answer.message.tool_calls
    assert answer.finish_reason == "tool_calls" and answer.message.content is None
    assert call.function.name == "weather" and json.loads(call.function.arguments) == {"city": "Oslo"}
    talk = [
        {"role": "user", "content": WEATHER},
        answer.message,
        {"role": "tool", "tool_call_id": call.id, "content": "rain"},
    ]
    assert chat(talk, tools=[ADD, TOOL]).choices[0].message.content == "It rains in Oslo."
    deltas = [d for c in chat(WEATHER, tools=[TOOL], stream=True) for d in c.choices[0].delta.tool_calls or ()]
    assert [(d.index, d.function.name, d.function.arguments) for d in deltas] == [(0, "weather", '{"city": "Oslo"}')]
    assert chat(WEATHER, tools=[TOOL], tool_choice="none").choices[0].message.tool_calls is None


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_tool_that_is_chosen_is_called_whatever_the_model_would_say(chat, client, stream):
    for choice in ({"type": "function", "function": {"name": "add"}}, "required"):
        tools = [ADD] if choice == "required" else [TOOL, ADD]
        options = {"tools": tools, "tool_choice": choice, "temperature": 1.0, "seed": 3, "parallel_tool_calls": False}
        if stream:
            with client.chat.completions.stream(
                model=NAME, messages=[{"role": "user", "content": "Hello"}], **options
            ) as course:
                answer = course.get_final_completion().choices[0]
        else:
            answer = chat("Hello", **options).choices[0]
        (call,) = answer.message.tool_calls
        arguments = json.loads(call.function.arguments)
        assert call.function.name == "add" and set(arguments) == {"a", "b"} and set(arguments.values()) <= {*range(10)}
        assert answer.finish_reason == "tool_calls" and not answer.message.content


def test_an_answer_has_the_form_that_is_asked_for(client):
    class Answer(pydantic.BaseModel):
        sure: bool
        colour: Literal["red", "blue"]

    for seed in range(3):
        answer = client.chat.completions.parse(
            model=NAME,
            messages=[{"role": "user", "content": "Hello"}],
            response_format=Answer,
            seed=seed,
            temperature=1.0,
        )
        assert answer.choices[0].message.parsed.colour in ("red", "blue")


def test_errors_are_the_clients_own_kinds(url, client):
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        client.completions.create(model="gpt-4", prompt="a")
    with pytest.raises(openai.BadRequestError, match="max_tokens=5000"):
        client.completions.create(model=NAME, prompt="a", max_tokens=5000)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model=NAME, prompt="a", temperature=9)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{url}/v1", api_key="other", max_retries=0).models.list()
