"""The server, over HTTP: what OpenAI's own client and plain requests get of it."""

import asyncio
import contextlib
import functools
import gc
import json
import signal
import socket
import threading
import time

import httpx
import jax
import models
import numpy as np
import openai
import pytest

from dsjax.config import Config, EngineConfig, ServerConfig, replace
from dsjax.data.tokenizer import BOS, EOS, bytes_tokenizer
from dsjax.hub.chat import ChatTemplate
from dsjax.hub.load import Loaded
from dsjax.infer.engine import Engine
from dsjax.infer.requests import Request, Sampled
from dsjax.infer.server import app
from dsjax.infer.server.driver import Driver
from dsjax.infer.server.run import Server
from dsjax.infer.server.service import Service
from dsjax.infer.text import Text
from sharding.mesh import make_mesh

CFG = models.v3(num_hidden_layers=2, max_position_embeddings=256, vocab_size=264)
WITHOUT_TOOLS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TEMPLATE = "{% if tools %}{{ tools | tojson }}{% endif %}" + WITHOUT_TOOLS
TOKENIZER = bytes_tokenizer()
KEY = {"authorization": "Bearer key"}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    TOKENIZER.save(folder / "tokenizer.json")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    mesh = make_mesh(jax.devices()[:1])
    with jax.set_mesh(mesh):
        model, bias = models.draw(CFG)
    return Loaded(model, bias, mesh, Config(model=CFG, seq_len=64, compute=models.COMPUTE), folder)


def make_service(loaded):
    with jax.set_mesh(loaded.mesh):
        engine = Engine(loaded, EngineConfig(max_rows=4, page_size=8, prefill_chunk=16))
    config = ServerConfig(api_key="key", max_waiting=6, max_body_mib=0.1, body_timeout_s=1)
    return Service(loaded, Driver(engine, config.max_waiting), config, "it")


@contextlib.contextmanager
def running(service):
    """The server and its thread, and where it listens."""
    server = Server(service, port=0)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server, thread, server.url
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def service(loaded):
    return make_service(loaded)


@pytest.fixture(scope="module")
def url(service):
    with running(service) as (_, _, url):
        yield url


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0)


@pytest.fixture
def post(url):
    def send(path, body, **headers):
        headers = KEY | headers
        content = body if isinstance(body, bytes | str) else json.dumps(body)
        return httpx.post(
            url + path, content=content, headers={"content-type": "application/json"} | headers, timeout=60
        )

    return send


def test_a_completion_is_the_same_whole_and_in_pieces(client):
    options = {"model": "it", "prompt": "def f(", "max_tokens": 20, "temperature": 1.0, "seed": 3}
    whole = client.completions.create(**options)
    pieces = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(p.choices[0].text for p in pieces if p.choices) == whole.choices[0].text
    assert whole.choices[0].finish_reason == pieces[-2].choices[0].finish_reason == "length"
    assert whole.usage.prompt_tokens == 7 and whole.usage.completion_tokens == 20
    assert pieces[-1].usage.total_tokens == 27 and not pieces[-1].choices
    assert all(p.usage is None for p in pieces[:-1])
    assert client.completions.create(**options | {"seed": 4}).choices[0].text != whole.choices[0].text


def test_prompts_of_every_kind_and_n_samples_each(client):
    ids = [TOKENIZER.bos_id, *TOKENIZER.encode("ab")]
    options = {"model": "it", "max_tokens": 5, "temperature": 0.0}
    text = client.completions.create(prompt="ab", **options).choices[0].text
    for prompt in (ids, [ids], ["ab"]):
        assert client.completions.create(prompt=prompt, **options).choices[0].text == text
    many = client.completions.create(prompt=["ab", "cd"], n=2, **options | {"temperature": 1.5, "seed": 0})
    assert [c.index for c in many.choices] == [0, 1, 2, 3]
    assert len({c.text for c in many.choices}) == 4
    assert many.usage.prompt_tokens == 6 and many.usage.completion_tokens == 20


def test_echo_gives_the_prompts_own_logprobs(client, service):
    ids = [TOKENIZER.bos_id, *TOKENIZER.encode("hello")]
    answer = client.completions.create(model="it", prompt=ids, max_tokens=1, echo=True, logprobs=2, temperature=0.0)
    got = answer.choices[0].logprobs
    assert len(got.tokens) == len(got.token_logprobs) == len(got.top_logprobs) == 7
    assert got.token_logprobs[0] is None and got.top_logprobs[0] is None
    assert got.tokens[1:6] == list("hello")
    loaded = service.loaded
    with jax.set_mesh(loaded.mesh):
        batch = models.pack([[6]], 6)
        batch = batch.replace(tokens=jax.device_put(np.array([ids], np.int32), batch.tokens.sharding))
        logits = loaded.model.logits(loaded.model(batch, loaded.router_bias, models.COMPUTE).hidden)[0]
        logp = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    np.testing.assert_allclose(got.token_logprobs[1:6], logp[np.arange(5), ids[1:]], atol=1e-4)
    np.testing.assert_allclose(got.token_logprobs[6], logp[5].max(), atol=1e-4)
    nothing = client.completions.create(model="it", prompt="hello", max_tokens=0, echo=True, logprobs=1)
    assert nothing.choices[0].text == "hello" and nothing.usage.completion_tokens == 0
    assert (
        nothing.choices[0].logprobs.tokens == list("hello") and None not in nothing.choices[0].logprobs.token_logprobs
    )
    assert nothing.choices[0].logprobs.text_offset == [0, 1, 2, 3, 4]


def test_a_chat_is_its_rendered_text(client):
    messages = [{"role": "user", "content": "hi"}]
    chat = client.chat.completions.create(model="it", messages=messages, max_tokens=8, temperature=0.0)
    text = client.completions.create(
        model="it", prompt=TOKENIZER.encode("user: hi\nassistant: "), max_tokens=8, temperature=0.0
    )
    assert chat.choices[0].message.content == text.choices[0].text
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    again = client.chat.completions.create(
        model="it", messages=parts, max_tokens=8, temperature=0.0, logprobs=True, top_logprobs=2
    )
    assert again.choices[0].message.content == chat.choices[0].message.content
    assert len(again.choices[0].logprobs.content) == 8 and len(again.choices[0].logprobs.content[0].top_logprobs) == 2
    stream = client.chat.completions.create(model="it", messages=messages, max_tokens=8, temperature=0.0, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in stream) == chat.choices[0].message.content


def test_a_stop_string_ends_the_text_and_is_no_part_of_it(client):
    options = {"model": "it", "prompt": "x", "max_tokens": 30, "temperature": 0.0}
    text = client.completions.create(**options).choices[0].text
    stop = text[3:5]
    got = client.completions.create(**options, stop=[stop, "zzzz"]).choices[0]
    assert got.text == text[: text.index(stop)] and got.finish_reason == "stop"
    kept = client.completions.create(**options, stop=stop, extra_body={"include_stop_str_in_output": True}).choices[0]
    assert kept.text == text[: text.index(stop)] + stop


def test_json_is_json_whatever_the_model_would_say(client):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    for seed in range(3):
        answer = client.chat.completions.create(
            model="it", messages=[{"role": "user", "content": "?"}], response_format=form, seed=seed, max_tokens=100
        )
        value = json.loads(answer.choices[0].message.content)
        assert set(value) == {"a", "b"} and value["a"] in range(10) and value["b"] in ("x", "y")
        assert answer.choices[0].finish_reason == "stop"
    with pytest.raises(openai.BadRequestError, match="response_format"):
        form["json_schema"]["schema"] = {"type": "no such type"}
        client.chat.completions.create(model="it", messages=[{"role": "user", "content": "?"}], response_format=form)


def test_a_grammar_that_is_done_ends_the_text(client):
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": {"const": 7}}}
    for more in ({"min_tokens": 20}, {"ignore_eos": True}):
        answer = client.completions.create(
            model="it", prompt="?", max_tokens=30, temperature=0.0, extra_body=more | {"response_format": form}
        )
        assert answer.choices[0].text == "7" and answer.choices[0].finish_reason == "stop"


DIGIT = {"type": "object", "properties": {"n": {"enum": [1, 2, 3]}}, "required": ["n"], "additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": "a.b", "parameters": DIGIT}},
    {"type": "function", "function": {"name": "c", "parameters": None}},
]


@pytest.mark.parametrize("source", [WITHOUT_TOOLS, WITHOUT_TOOLS + "{# ```json #}", WITHOUT_TOOLS + "<think>\n"])
def test_a_tool_that_must_be_called_is_called(client, service, monkeypatch, source):
    monkeypatch.setattr(service, "template", ChatTemplate(source))
    ask = functools.partial(
        client.chat.completions.create, model="it", messages=[{"role": "user", "content": "?"}], tools=TOOLS, seed=1
    )
    for options in (
        {"tool_choice": {"type": "function", "function": {"name": "a.b"}}},
        {"tool_choice": "required", "tools": TOOLS[:1], "parallel_tool_calls": False},
    ):
        choice = ask(**options, extra_body={"thinking_budget": 3}).choices[0]
        (call,) = choice.message.tool_calls
        assert call.function.name == "a.b" and json.loads(call.function.arguments)["n"] in (1, 2, 3)
        assert choice.finish_reason == "tool_calls" and not choice.message.content
        assert ("reasoning_content" in choice.message.model_extra) == source.endswith("<think>\n")
    with pytest.raises(openai.BadRequestError, match="no tool of the name d"):
        ask(tool_choice={"type": "function", "function": {"name": "d"}})


def test_a_majority_votes(client):
    answer = client.chat.completions.create(
        model="it", messages=[{"role": "user", "content": "1+1"}], max_tokens=10, seed=0, extra_body={"majority": 5}
    )
    assert sum(vote["votes"] for vote in answer.votes) == 5 and len(answer.choices) == 1


def test_tokens_and_back(post, url, client):
    got = post("/tokenize", {"prompt": "hé", "return_token_strs": True}).json()
    assert got["tokens"] == [TOKENIZER.bos_id, *TOKENIZER.encode("hé")] and got["count"] == 4
    assert post("/detokenize", {"tokens": got["tokens"][1:]}).json() == {"prompt": "hé"}
    for text, ids in ((EOS, [TOKENIZER.eos_id]), (f"a{BOS}", [*TOKENIZER.encode("a"), TOKENIZER.bos_id])):
        assert post("/tokenize", {"prompt": text, "add_special_tokens": False}).json()["tokens"] == ids
        assert post("/tokenize", {"prompt": text}).json()["tokens"] == [TOKENIZER.bos_id, *TOKENIZER.encode(text)]
    rendered = post("/tokenize", {"messages": [{"role": "user", "content": "a"}]}).json()["tokens"]
    assert TOKENIZER.decode(rendered) == "user: a\nassistant: "
    assert [m.id for m in client.models.list()] == ["it"]
    info = httpx.get(f"{url}/tokenizer_info", headers=KEY).json()
    assert info["chat_template"] == TEMPLATE
    assert httpx.get(f"{url}/health").status_code == httpx.get(f"{url}/ready").status_code == 200


NESTED = "[" * 700 + "]" * 700
BAD = [
    ("/v1/completions", {"prompt": "x", "max_tokens": -1}, 400, "max_tokens"),
    ("/v1/completions", {"prompt": "x", "temperature": 3}, 400, "temperature"),
    ("/v1/completions", {"prompt": "x", "temperature": "warm"}, 400, "temperature"),
    ("/v1/completions", {"prompt": []}, 400, "prompt"),
    ("/v1/completions", {"prompt": [999]}, 400, "token 999"),
    ("/v1/completions", {"prompt": "x" * 300}, 400, "301 tokens"),
    ("/v1/completions", {"prompt": "x", "max_tokens": 5000}, 400, "max_tokens=5000"),
    ("/v1/completions", {"prompt": "x", "model": "gpt-4"}, 404, "gpt-4"),
    ("/v1/completions", {"prompt": "x", "logit_bias": {"999": 1}}, 400, "logit_bias"),
    ("/v1/completions", {"prompt": "x", "logit_bias": {"\ud800": 1}}, 400, "logit_bias"),
    ("/v1/completions", {"prompt": "x", "stop_token_ids": [999], "min_tokens": 5}, 400, "stop_token_ids: 999"),
    ("/v1/completions", {"prompt": "\ud800"}, 400, "surrogate"),
    ("/v1/completions", {"prompt": "x", "suffix": "\ud800"}, 400, "surrogate"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "\ud800"}]}, 400, "surrogate"),
    ("/tokenize", {"prompt": "\ud800"}, 400, "surrogate"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, 400, "tools"),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "x"}], "tools": [{"function": 1}]},
        400,
        "tools",
    ),
    ("/v1/completions", "{", 400, "JSON"),
    ("/v1/completions", b"x" * 200_000, 413, "larger"),
    ("/v1/completions", b'{"prompt": "\xff"}', 400, "parsing"),
    ("/v1/completions", '{"prompt": "x", "temperature": NaN}', 400, "temperature"),
    ("/v1/completions", '{"prompt": "x", "max_tokens": 1e400}', 400, "max_tokens"),
    ("/v1/completions", '{"prompt": "x", "seed": ' + "9" * 5000 + "}", 400, "parsing"),
    ("/v1/completions", '{"prompt": "x", "model": "\\ud800"}', 404, "model"),
    ("/v1/completions", "[" * 50_000, 400, "parsing"),
    ("/v1/completions", {"prompt": "x", "n": 20}, 400, "at most 10"),
    ("/v1/chat/completions", '{"messages": [{"role": ' + NESTED + "}]}", 400, "role"),
    ("/v1/chat/completions", {"messages": []}, 400, "messages"),
    ("/v1/chat/completions", {"messages": [{"content": "x"}]}, 400, "role"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "text"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "tool_choice": "required"}, 400, "tools"),
    ("/tokenize", {}, 400, "prompt or messages"),
    ("/detokenize", {"tokens": [300]}, 400, "below 264"),
    ("/v1/nothing", {}, 404, "Not Found"),
]


@pytest.mark.parametrize(("path", "body", "status", "word"), BAD, ids=lambda x: str(x)[:30])
def test_what_is_wrong_gets_openais_envelope(post, path, body, status, word):
    answer = post(path, body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert word in error["message"] and "\n" not in error["message"] and error["code"] == status
    assert set(error) == {"message", "type", "param", "code"}


def test_a_nested_body_is_an_error_or_left_alone_at_any_depth(post):
    for depth in range(800, 1000, 10):
        nested = "[" * depth + "]" * depth
        answer = post("/v1/chat/completions", f'{{"messages": [{{"role": {nested}}}]}}')
        assert answer.status_code == 400 and answer.json()["error"]["code"] == 400
        chat = f'{{"messages": [{{"role": "user", "content": "x"}}], "max_tokens": 1, "tools": [{{"a": {nested}}}]}}'
        assert post("/v1/chat/completions", chat).status_code in (200, 400)


def test_what_a_template_is_given_cannot_replace_the_messages(post):
    names = {"messages": 3, "service": 3, "self": 3, "add_generation_prompt": True}
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    assert post("/v1/chat/completions", body | {"chat_template_kwargs": names}).status_code == 200


def test_the_schema_names_what_errors_look_like(url):
    schema = httpx.get(f"{url}/openapi.json").json()
    answers = schema["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert {"200", "4XX", "5XX"} == set(answers) and "text/event-stream" in answers["200"]["content"]
    assert schema["components"]["schemas"]["ChatRequest"]["properties"]["messages"]["items"]["required"] == [
        "role",
        "content",
    ]
    refused = httpx.put(f"{url}/v1/completions")
    assert refused.status_code == 405 and refused.headers["allow"] == "POST"


def test_a_wrong_key_is_refused_and_unknown_fields_are_taken(post):
    assert post("/v1/completions", {"prompt": "x"}, authorization="Bearer nokey").status_code == 401
    assert post("/v1/completions", {"prompt": "x"}, authorization="").status_code == 401
    assert post("/v1/completions", {"prompt": "x", "max_tokens": 1, "whatever": {"a": 1}}).status_code == 200


def test_who_goes_away_is_forgotten_and_a_full_queue_says_so(url, service):
    async def go():
        body = {"prompt": "x", "max_tokens": 200, "stream": True, "ignore_eos": True}
        async with httpx.AsyncClient(base_url=url, headers=KEY, timeout=60) as http:

            async def begin(stream=True):
                async with http.stream("POST", "/v1/completions", json=body | {"stream": stream}) as answer:
                    if answer.status_code == 200 and stream:
                        async for _ in answer.aiter_lines():
                            break
                    return answer.status_code, answer.headers

            many = [asyncio.create_task(begin()) for _ in range(30)]
            codes = [(await task)[0] for task in many]
            assert set(codes) <= {200, 429} and 200 in codes
            task = asyncio.create_task(begin(stream=False))
            await asyncio.sleep(0.3)
            task.cancel()
        end = time.monotonic() + 20
        while (service.driver.engine.busy or service.driver.n_open) and time.monotonic() < end:
            await asyncio.sleep(0.02)

    asyncio.run(go())
    assert not service.driver.engine.busy and service.driver.n_open == 0
    assert all(pool.n_held == 0 for pool in service.driver.engine.pools)
    assert service.driver.engine.counts["ended_cancelled"] > 0


@pytest.fixture
def slow(service, monkeypatch):
    """Steps take their time."""
    slow_down(service, monkeypatch)


def slow_down(service, monkeypatch):
    step = service.driver.engine.step

    def later():
        time.sleep(0.02)
        step()

    monkeypatch.setattr(service.driver.engine, "step", later)


LONG = {"prompt": "x", "max_tokens": 200, "ignore_eos": True}
CHAT = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 200, "ignore_eos": True}


def until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


@contextlib.contextmanager
def raw(url, start):
    """A connection on which a request has begun."""
    address = httpx.URL(url)
    with socket.create_connection((address.host, address.port), timeout=30) as s:
        s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: it\r\nAuthorization: Bearer key\r\n" + start)
        yield s


def last_words(s):
    """All that still comes, up to the end of the connection."""
    said = b""
    with contextlib.suppress(ConnectionError):
        while piece := s.recv(65536):
            said += piece
    return said


def test_a_body_without_end_is_refused_at_the_limit(url):
    sent = 0
    with raw(url, b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n") as s:
        with contextlib.suppress(ConnectionError):
            while sent < 100e6:
                sent += s.send(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
        said = last_words(s)
    assert sent < 50e6 and (b" 413 " in said or not said)  # what is not read yet may take the answer with it
    with raw(url, b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n") as s:
        s.sendall(b"1a000\r\n" + b" " * 0x1A000 + b"\r\n")
        said = last_words(s)
    assert b" 413 " in said and b"larger than" in said


@pytest.mark.parametrize("often", [False, True])
def test_a_body_that_does_not_come_is_not_waited_for(url, often):
    with raw(url, b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{") as s:
        begin = time.monotonic()
        while often and time.monotonic() < begin + 1.5:
            with contextlib.suppress(ConnectionError):
                s.send(b" ")
            time.sleep(0.05)
        said = last_words(s)
    assert time.monotonic() - begin < 5
    assert often or (b" 408 " in said and b'"error"' in said)


def test_who_finds_no_room_is_told_when_to_come_again(url, service, slow):
    with httpx.Client(base_url=url, headers=KEY, timeout=60) as http:
        with http.stream("POST", "/v1/completions", json=LONG | {"n": 9, "stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            for path, body in (("/v1/completions", LONG), ("/v1/chat/completions", CHAT)):
                for stream in (False, True):
                    refused = http.post(path, json=body | {"n": 2, "stream": stream})
                    assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
                    assert refused.json()["error"]["type"] == "rate_limit_error"
            assert http.post("/v1/completions", json=LONG | {"max_tokens": 1}).status_code == 200  # one place is left
        assert until(lambda: service.driver.n_open == 0)


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", LONG), ("/v1/chat/completions", CHAT)])
@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_while_waiting_leaves_its_place(url, service, slow, path, body, stream):
    with httpx.Client(base_url=url, headers=KEY, timeout=60) as http:
        with http.stream("POST", "/v1/completions", json=LONG | {"n": 4, "stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            with pytest.raises(httpx.ReadTimeout), http.stream(
                "POST", path, json=body | {"stream": stream}, timeout=httpx.Timeout(60, read=0.2)
            ) as waits:  # fmt: skip
                waits.read()
            assert until(lambda: service.driver.n_open == 4, 2)
            assert until(lambda: len(service.driver.engine.waiting) == 0, 2)
            assert len(service.driver.engine.running) == 4
        assert until(lambda: service.driver.n_open == 0)


def test_what_takes_too_long_is_ended_and_told(url, service, slow, monkeypatch):
    monkeypatch.setattr(service, "config", replace(service.config, timeout_s=0.4))
    with httpx.Client(base_url=url, headers=KEY, timeout=60) as http:
        for path, body in (("/v1/completions", LONG), ("/v1/chat/completions", CHAT)):
            whole = http.post(path, json=body)
            assert whole.status_code == 504 and "not done in 0.4 s" in whole.json()["error"]["message"]
            stream = http.post(path, json=body | {"stream": True})
            assert stream.status_code == 200
            last = json.loads(stream.text.strip().split("\n\n")[-1].removeprefix("data: "))
            assert last["error"]["code"] == 504 and "not done in 0.4 s" in last["error"]["message"]
    assert until(lambda: not service.driver.engine.busy and service.driver.n_open == 0)
    monkeypatch.setattr(service.driver.engine, "rows_a_shard", 0)  # nobody gets a row
    assert httpx.post(f"{url}/v1/completions", headers=KEY, json=LONG | {"stream": True}).status_code == 504
    assert until(lambda: not service.driver.engine.busy and service.driver.n_open == 0)


def test_who_does_not_read_its_stream_is_cut_off(post, service, monkeypatch):
    assert post("/v1/completions", LONG).status_code == 200  # all is compiled
    monkeypatch.setattr(service, "config", replace(service.config, timeout_s=1))
    monkeypatch.setattr(app, "_GRACE_S", 0.2)
    body = json.dumps(LONG | {"stream": True}).encode()
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/completions",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"authorization", b"Bearer key")],
    }

    async def go():
        came, for_ever = [{"type": "http.request", "body": body}], asyncio.Event()

        async def receive():
            return came.pop() if came else await for_ever.wait()

        async def send(message):
            if message["type"] == "http.response.body":
                await for_ever.wait()

        await asyncio.wait_for(app.create_app(service)(scope, receive, send), 10)
        while service.driver.engine.busy or service.driver.n_open:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(go(), 20))


def test_a_server_that_ends_says_so_first_and_lets_requests_end(loaded, monkeypatch):
    service = make_service(loaded)
    slow_down(service, monkeypatch)
    with running(service) as (server, thread, url), httpx.Client(base_url=url, headers=KEY, timeout=60) as http:
        idle, silent = httpx.Client(base_url=url), socket.create_connection(httpx.URL(url).netloc.decode().split(":"))
        assert idle.get("/ready").status_code == 200
        with http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.handle_exit(signal.SIGTERM, None)
            assert until(lambda: httpx.get(f"{url}/ready").status_code == 503, 2)
            assert idle.get("/ready").status_code == 503 and idle.get("/health").status_code == 200
            refused = httpx.post(f"{url}/v1/completions", headers=KEY, json=LONG)
            assert refused.status_code == 503 and "ending" in refused.json()["error"]["message"]
            assert list(lines)[-2] == "data: [DONE]"
        begin = time.monotonic()
        thread.join(20)
        assert not thread.is_alive() and time.monotonic() - begin < 3  # the idle connections do not hold it
        idle.close()
        silent.close()


def test_nothing_of_a_request_is_kept_when_it_has_ended(post, url, service):
    def kept():
        return [type(o).__name__ for o in gc.get_objects() if type(o) in (Request, Text, Sampled)]

    def ask():
        for path, body in (("/v1/completions", LONG), ("/v1/chat/completions", CHAT)):
            for stream in (False, True):
                assert post(path, body | {"max_tokens": 5, "stream": stream}).status_code == 200
                with contextlib.suppress(httpx.ReadTimeout):
                    httpx.post(url + path, json=body | {"n": 4, "stream": stream}, headers=KEY, timeout=0.1)

    ask()
    assert until(lambda: not service.driver.engine.busy and service.driver.n_open == 0)
    gc.collect()
    gc.disable()  # what is freed is freed at once: a large heap is seldom searched for cycles
    try:
        ask()
        assert until(lambda: not service.driver.engine.busy and service.driver.n_open == 0)
        assert until(lambda: not kept(), 2), kept()
    finally:
        gc.enable()


def test_a_request_that_comes_and_goes_between_two_steps_is_gone(loaded):
    engine, ended = make_service(loaded).driver.engine, []
    second = Request([1], max_tokens=3, done=ended.append)

    def come_and_go(reason):
        engine.submit(second)
        engine.cancel(second.id)

    first = Request([1], max_tokens=3, done=come_and_go)
    engine.submit(first)
    engine.cancel(first.id)
    with jax.set_mesh(engine.mesh):
        engine.run()
    assert ended == ["cancelled"]


def test_a_step_that_fails_ends_its_requests_and_the_next_ones_are_well(post, service, monkeypatch):
    from dsjax.infer import programs

    step = programs.step

    def fail(*args, **options):
        monkeypatch.setattr(programs, "step", step)
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(programs, "step", fail)
    assert post("/v1/completions", {"prompt": "x", "max_tokens": 5}).status_code == 500
    assert post("/v1/completions", {"prompt": "x", "max_tokens": 5}).status_code == 200
    assert service.driver.failures == 1
