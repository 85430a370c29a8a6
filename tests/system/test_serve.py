"""`dsjax serve` and `dsjax generate --batch` through the real command line."""

import json
import os
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
def served(trained):
    command = [*MAIN, "serve", str(trained), "--port=0", "--max-rows=2", "--prefill-chunk=32", "--name=it"]
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
