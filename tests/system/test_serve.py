"""`dsjax serve` and `dsjax generate --batch` through the real command line."""

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time

import httpx
import jax
import pytest
import runs
from click.testing import CliRunner

from dsjax.cli import cli
from dsjax.train import layout

MAIN = [sys.executable, "-c", "from dsjax.cli import main; main()"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    texts = runs.write_texts(folder / "texts")
    path = runs.write_config(runs.micro(texts), folder / "micro.json")
    with runs.compiled_once(tmp_path_factory), pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "devices", lambda: jax.devices()[:1])
        result = CliRunner().invoke(cli, ["train", str(path), "--run", str(folder / "run"), "--steps=4", "--quiet"])
    assert result.exit_code == 0, result.stderr
    return folder / "run"


@pytest.fixture
def served(trained, request):
    options = getattr(request, "param", ["--max-rows=2", "--prefill-chunk=32", "--name=it"])
    command = [*MAIN, "serve", str(trained), "--port=0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "DSJAX_API_KEY": "key"})
    said = []
    reader = threading.Thread(target=lambda: said.extend(process.stderr), daemon=True)
    reader.start()
    url, end = None, time.monotonic() + 120
    while url is None and process.poll() is None and time.monotonic() < end:
        url = next((m[0] for m in (re.search(r"http://\S+", line) for line in said) if m), None)
        time.sleep(0.05)
    assert url, said
    yield process, url, said
    process.kill()
    process.wait()


def test_a_run_is_served_until_sigterm_which_lets_requests_end(served):
    process, url, said = served
    assert "it is served at" in "".join(said) and url.startswith("http://127.0.0.1:")
    with httpx.Client(base_url=url, timeout=60) as http:
        assert http.get("/ready").status_code == 200
        assert http.post("/v1/completions", json={"prompt": "a"}).status_code == 401
        http.headers["authorization"] = "Bearer key"
        body = {"prompt": "def ", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        whole = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
        assert "dsjax_generated_tokens_total 12.0" in http.get("/metrics").text
        page = http.get("/")
        assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]
        assert "http" not in page.text.replace("http-equiv", "")  # nothing from outside
        with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [json.loads(line[6:]) for line in [first, *lines] if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in rest) == whole
    assert process.wait(60) == 0


CROWDED = ["--max-rows=4", "--prefill-chunk=32", "--page-size=8", "--cache-tokens=200", "--one-shape"]


@pytest.mark.parametrize("served", [CROWDED], indirect=True)
def test_who_leaves_takes_nothing_along_and_who_stays_gets_what_it_would_get_alone(served):
    _, url, said = served
    draw = random.Random(0)
    asked = [
        {
            "prompt": "".join(draw.choices("def return(x)", k=draw.choice([3, 20, 40]))),
            "max_tokens": draw.choice([5, 20, 40]),
            "temperature": draw.choice([0, 0.7]),
            "seed": draw.randrange(100),
            "n": draw.choice([1, 1, 2]),
            "ignore_eos": True,
        }
        for _ in range(12)
    ]

    async def ask(http, body, leaves=False):
        """The texts, or None for one that leaves."""
        texts, pieces = [""] * body["n"], draw.choice([0, 0, 1, 9])
        try:
            async with http.stream(
                "POST",
                "/v1/completions",
                json=body | {"stream": True},
                timeout=httpx.Timeout(60, read=draw.uniform(0.001, 0.2)) if leaves and not pieces else 60,
            ) as answer:
                assert answer.status_code == 200
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        choice = json.loads(line[6:])["choices"][0]
                        texts[choice["index"]] += choice["text"]
                        pieces -= 1
                        if leaves and pieces == 0:
                            return None
        except httpx.ReadTimeout:
            return None
        return texts

    async def client(http, alone):
        for _ in range(6):
            n, leaves = draw.randrange(len(asked)), draw.random() < 1 / 3
            got = await ask(http, asked[n], leaves)
            assert got == alone[n] or (leaves and got is None)

    async def go():
        async with httpx.AsyncClient(
            base_url=url, headers={"authorization": "Bearer key"}, limits=httpx.Limits(max_connections=None)
        ) as http:
            alone = [await ask(http, body) for body in asked]
            pages = numbers((await http.get("/metrics")).text)
            await asyncio.gather(*(client(http, alone) for _ in range(16)))
            end = time.monotonic() + 20
            while True:
                found = numbers((await http.get("/metrics")).text)
                if not found["requests_running"] + found["requests_waiting"] or time.monotonic() > end:
                    return pages, found

    before, after = asyncio.run(go())
    assert after["requests_running"] == after["requests_waiting"] == after["failed_steps_total"] == 0
    states = [f'cache_pages{{state="{name}"}}' for name in ("held", "idle", "free")]
    assert after[states[0]] == 0 and sum(after[s] for s in states) == sum(before[s] for s in states) == 25
    assert after["preemptions_total"] > 0 and after['requests_ended_total{reason="cancelled"}'] > 0
    assert len(said) == 1, said  # no error was printed


def numbers(metrics: str) -> dict[str, float]:
    pairs = (line.removeprefix("dsjax_").rpartition(" ") for line in metrics.splitlines() if line[0] != "#")
    return {name: float(value) for name, _, value in pairs}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port=99999"], "--port=99999: expected a port from 0 to 65535"),
        (["--mesh=rows=2"], "--mesh=rows=2: no axis rows; the nearest is"),
        (["--mesh=expert=0"], "--mesh=expert=0: expected expert=N with a whole number greater than 0"),
        (["--mesh=expert=64"], "--mesh=expert=64: needs 64 devices"),
        (["--prefill-chunk=50"], "prefill_chunk=50: expected a multiple of page_size=32"),
        (["--n-draft=9"], "--n-draft=9: expected a whole number at least 0 and at most 8"),
        (["--timeout-s=nan"], "--timeout-s=nan: expected a number greater than 0"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_options_that_cannot_be_are_refused_in_one_line(trained, options, message):
    result = CliRunner().invoke(cli, ["serve", str(trained), *options])
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1


def test_prompts_from_a_file_to_a_file(trained, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "def "}\n{"prompt": "a", "max_tokens": 2}\n')
    command = ["generate", str(trained), "--batch", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    result = CliRunner().invoke(cli, [*command, "--max-tokens=5"])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["line"] for row in rows] == [1, 2] and rows[1]["completion_tokens"] <= 2
    alone = CliRunner().invoke(cli, ["generate", str(trained), "--batch", str(tmp_path / "in.jsonl")])
    assert alone.exit_code == 2 and "--batch: expected with --out" in alone.stderr
