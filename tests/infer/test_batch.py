"""Prompts from a file to a file: in order, once, and on from where it was ended."""

import json

import models
import pytest

from dsjax.config import ConfigError, EngineConfig
from dsjax.infer.batch import run_batch
from dsjax.infer.engine import Engine

OPTIONS = EngineConfig(max_rows=4, page_size=8, prefill_chunk=16)
CFG = models.v3(num_hidden_layers=2, max_position_embeddings=64, vocab_size=264)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return models.of_bytes(folder, CFG)


def write(path, records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


PROMPTS = [{"prompt": "abc", "id": "first"}, {"prompt": "d", "max_tokens": 3}, "", {"prompt": "efg", "stop": ["q"]}]


def test_every_prompt_is_continued_once_and_a_run_that_was_ended_goes_on(loaded, tmp_path, monkeypatch):
    prompts, whole, out = write(tmp_path / "in.jsonl", PROMPTS), tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    defaults = {"max_tokens": 8, "temperature": 1.0, "seed": 5}
    assert run_batch(loaded, prompts, whole, OPTIONS, defaults) == 3
    rows = read(whole)
    assert [row["line"] for row in rows] == [1, 2, 4] and rows[0]["id"] == "first"
    assert rows[1]["completion_tokens"] == 3 and rows[1]["finish_reason"] == "length"

    step, n = Engine.step, 0

    def killed(self):
        nonlocal n
        n += 1
        if n == 5:  # one prompt is done by now
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(Engine, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        run_batch(loaded, prompts, out, OPTIONS, defaults)
    monkeypatch.setattr(Engine, "step", step)
    assert [row["line"] for row in read(out)] == [2]
    with out.open("a") as file:
        file.write('{"line": 1, "te')  # cut off
    said = []
    assert run_batch(loaded, prompts, out, OPTIONS, defaults, say=said.append) == 2
    assert said == [f"{out}: 1 are there already; 2 are left"]
    assert out.read_text() == whole.read_text()
    assert run_batch(loaded, prompts, out, OPTIONS, defaults, say=said.append) == 0


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "line 2: not JSON"),
        ({"text": "x"}, "line 2: expected an object with prompt or with messages"),
        ({"prompt": 3}, "line 2: prompt=3: expected a text"),
        ({"prompt": "x", "temperature": "hot"}, "line 2: temperature=hot: expected a number"),
        ({"prompt": "x", "max_tokens": 100}, "line 2: max_tokens=100: expected at most 62 after a prompt of 2 tokens"),
        ({"messages": [{"role": "user", "content": "x"}]}, "line 2: .*no chat template"),
    ],
    ids=str,
)
def test_a_line_that_cannot_be_done_is_named_and_nothing_is_written(loaded, tmp_path, record, message):
    prompts, out = write(tmp_path / "in.jsonl", [{"prompt": "a"}, record]), tmp_path / "out.jsonl"
    with pytest.raises(ConfigError, match=message):
        run_batch(loaded, prompts, out, OPTIONS, {"max_tokens": 4})
    assert not out.exists()


def test_a_file_of_something_else_is_left_alone(loaded, tmp_path):
    prompts, out = write(tmp_path / "in.jsonl", [{"prompt": "a"}]), tmp_path / "notes.txt"
    out.write_text("my notes\nof today\n")
    with pytest.raises(ConfigError, match=r"notes\.txt: line 1: not one that this command wrote"):
        run_batch(loaded, prompts, out, OPTIONS, {"max_tokens": 4})
    assert out.read_text() == "my notes\nof today\n"
