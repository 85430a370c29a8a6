"""The page of a run: one file, well-formed, true to the numbers, silent on the network, for every state of a run."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import configs
from dsjax.cli import cli
from dsjax.config import replace, save
from dsjax.state import Metrics, RouterBias
from dsjax.train import curves, digest, page
from dsjax.train.lines import read_lines
from dsjax.train.metrics import Interval, Recorder

VOID = {"meta", "link", "input", "br", "img", "hr"}
FACTS = {
    "python": "3.12.0",
    "sha256": "c0ffee" * 10,
    "sources": ["stdlib"],
    "train": {"documents": 10, "bytes": 12_345, "tokens": 3_456},
    "heldout": {"documents": 1, "bytes": 123, "tokens": 34},
    "skipped": {},
    "gzip_bpb": 2.1745,
    "xz_bpb": 1.9471,
}


class Reader(HTMLParser):
    """Checks that tags match; keeps tags, text and the contents of scripts."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.tags, self.text, self.scripts = [], [], "", []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes), f"<{tag}> has an attribute twice"
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open[-1:] == ["script"]:
            self.scripts[-1] += text
        elif self.open[-1:] != ["style"]:
            self.text += text

    @property
    def data(self):
        return json.loads(self.scripts[0])


def write_rows(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(folder: Path, steps=(2, 4, 6), layers=2, depth=1, experts=4, nan_at=(), held=(4, 6), **changes) -> Path:
    """A run folder as the loop leaves it, without the training."""
    folder.mkdir(parents=True)
    save(replace(configs.load("tiny"), steps=6, **changes), folder / "config.json")
    recorder, draw = Recorder(folder, 0), np.random.default_rng(0)
    names = [f"layer {k + 2}" for k in range(layers)] + [f"MTP {k + 1}" for k in range(depth)]
    machine = {"python": "3.12.0", "jax": "0.10.2", "platform": "tpu", "device": "TPU v5p", "devices": 8}
    recorder.write("run", 0, {"title": "tiny, stdlib", "layers": names, "facts": FACTS, **machine})
    for step in steps:
        interval, bad = Interval(), step in nan_at
        loads = draw.integers(1, 50, (layers + depth, experts)).astype(np.float32)
        values = (np.nan if bad else 8 - step / 10, [np.nan if bad else 8.5] * depth, 0.1, np.nan if bad else 2.0)
        load = RouterBias(loads[:layers], loads[layers:])
        rest = (*map(np.int32, (0, int(bad), int(bad))), np.False_, np.zeros(2), np.ones(3))
        interval.add(
            Metrics(*(np.asarray(v, np.float32) for v in values), load, np.full(layers + depth, 0.5, np.float32), *rest)
        )
        more = {"learning_rate": 1e-3, "mtp_weight": 0.3, "bias_update_speed": 0.001, "tokens": 1024 * step}
        recorder.write("train", step, {**interval.row(), **more, "tokens_per_s": 1234.5})
        if step in held:
            nats = {"heldout_nats": 7.6543, "heldout_bpb": None if bad else 2.3456}
            recorder.write("eval", step, {**nats, "gzip_bpb": FACTS["gzip_bpb"], "xz_bpb": FACTS["xz_bpb"]})
    recorder.close()
    return folder


def read(folder: Path, preset=None) -> Reader:
    return Reader(page.page(folder, preset))


def test_the_numbers_are_those_of_the_run(tmp_path):
    run = make_run(tmp_path / "mine", batch_size=4)
    write_rows(
        run / "goodput.jsonl",
        [
            {"kind": "start", "session": 1, "time": 1010.0, "step": 0, "seconds": {"restart": 10.0}},
            {"kind": "end", "session": 1, "time": 1050.0, "step": 6, "seconds": {"step": 30.0, "compile": 10.0}},
        ],
    )
    write_rows(run / "incidents.jsonl", [{"time": 1020.0, "step": 4, "kind": "spike", "text": "loss 9.9 at step 4"}])
    (run / "checkpoints/6").mkdir(parents=True)
    (run / "checkpoints/6/weights").write_bytes(bytes(2_500_000))
    found = read(run, configs.load("tiny"))
    for text in ("7.4000", "2.3456", "7.6543", "60.0%", "0:50", "loss 9.9 at step 4", "1970-01-01 00:17:00", "2.5 MB"):
        assert text in found.text, text
    for text in ("TPU v5p", "0.10.2", "12,345 bytes", "c0ffee" * 10, "All steps are done."):
        assert text in found.text, text
    by_name = {chart["id"]: chart for chart in found.data["charts"]}
    assert [(s["name"], s["y"]) for s in by_name["loss"]["series"]] == [
        ("MTP", [8.5, 8.5, 8.5]),
        ("training", [7.8, 7.6, 7.4]),
        ("held out", [7.6543, 7.6543]),
    ]
    assert by_name["batch"]["series"][0]["y"] == [1024, 1024, 1024]
    assert [line["value"] for line in by_name["heldout"]["lines"]] == [2.1745, 1.9471]
    assert found.data["steps"] == {"train": [2, 4, 6], "eval": [4, 6]}
    assert found.data["marks"] == [[4, "spike", "loss 9.9 at step 4"]]
    assert found.data["layers"] == ["layer 2", "layer 3", "MTP 1"]


def test_fields_that_differ_from_the_preset_are_marked(tmp_path):
    html = page.page(make_run(tmp_path / "run", batch_size=4), configs.load("tiny"))
    marked = re.findall(r'class="changed"[^>]*><dt>(\w+)</dt><dd><del>(\w+)</del> (\w+)<', html)
    assert marked == [("steps", "300", "6"), ("batch_size", "8", "4")]
    assert "no preset" in page.page(tmp_path / "run")


def test_loads_come_back_from_their_bytes(tmp_path):
    run = make_run(tmp_path / "run", steps=range(1, 8), experts=5)
    rows = [row for row in read_lines(run / "metrics.jsonl") if row["kind"] == "train"]
    loads = np.array([row["load"] for row in rows], float)  # [rows, layers, experts]
    want = (loads / loads.mean(2, keepdims=True)).transpose(1, 2, 0)
    packed = read(run).data["loads"]
    codes = np.frombuffer(base64.b64decode(packed["bytes"]), np.uint8).reshape(want.shape)
    np.testing.assert_allclose(np.exp2((codes.astype(float) - 128) / 16), want, rtol=0.0222)
    assert packed["steps"] == list(range(1, 8))


@pytest.mark.parametrize("n", [1, 7, 8, 9, 50])
def test_columns_are_sums_of_rows_that_follow_each_other(monkeypatch, n):
    monkeypatch.setattr(digest, "LOAD_COLUMNS", 4)
    loads, counts = digest.Loads(), np.random.default_rng(0).integers(1, 9, (n, 2, 3))
    for step, load in enumerate(counts, 1):
        loads.add(step, load.tolist())
    loads.add(n, counts[0].tolist())  # a step again
    loads.add(n + 1, [[1, 2]])  # another shape
    loads.add(n + 1, None)
    packed = loads.packed()
    steps, rows = packed["steps"], packed["rows"]
    assert len(steps) <= 4 and steps[-1] == n
    assert steps[:-1] == list(range(rows, n, rows))[: len(steps) - 1]
    codes = np.frombuffer(base64.b64decode(packed["bytes"]), np.uint8).reshape(2, 3, -1).astype(float)
    sums = np.stack([counts[a:b].sum(0) for a, b in zip([0, *steps], steps)], -1)
    np.testing.assert_allclose(np.exp2((codes - 128) / 16), sums / sums.mean(1, keepdims=True), rtol=0.0222)


def test_an_expert_without_tokens_and_a_layer_without_any():
    loads = digest.Loads()
    loads.add(1, [[0, 4], [0, 0]])
    assert list(base64.b64decode(loads.packed()["bytes"])) == [0, 144, digest.UNKNOWN, digest.UNKNOWN]


def test_a_thinned_curve_keeps_its_extremes(monkeypatch):
    monkeypatch.setattr(digest, "POINTS", 10)
    rows = [{"kind": "train", "step": k, "loss": 50.0 if k == 77 else 1.0, "grad_norm": None} for k in range(1, 101)]
    found = digest.Digest(rows)
    curve = found.curve("loss")
    assert (max(curve["hi"]), curve["hi"].index(50.0), curve["y"][7], curve["lo"][7]) == (50.0, 7, 5.9, 1.0)
    assert found.steps["train"] == list(range(10, 101, 10))
    assert found.curve("grad_norm") is None
    assert [chart["id"] for chart in curves.charts(found, None)] == ["loss", "heldout"]


STATES = {
    "begun": dict(steps=(), held=()),
    "one row": dict(steps=(2,), held=()),
    "no evaluation": dict(held=()),
    "dense": dict(layers=0, depth=0),
    "without MTP": dict(depth=0),
    "NaN": dict(nan_at=(4,)),
    "all NaN": dict(nan_at=(2, 4, 6)),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("state", STATES)
def test_every_state_of_a_run(tmp_path, state):
    run = make_run(tmp_path / "run", **STATES[state])
    whole = read(run).data
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    assert read(run).data == whole
    assert "NaN" not in json.dumps(whole)
    (run / "metrics.jsonl").unlink()
    assert "No row of metrics" in read(run).text


@pytest.mark.filterwarnings("error")
def test_rows_of_any_kind_are_borne(tmp_path):
    run = make_run(tmp_path / "run")
    odd = [{"kind": "train", "step": 8}, {"kind": "eval", "step": 9}, {"kind": "train", "step": None, "load": 3}, {}]
    odd += [
        {"kind": "train", "step": 9, "loss": "x", "max_vio": 3, "load": [[1], [2, 3]], "tokens": -1, "mtp_loss": {}}
    ]
    odd += [{"kind": "run", "step": 0, "facts": [], "layers": 7, "title": None, "time": "x"}, [1], None]
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in odd)
    write_rows(run / "incidents.jsonl", [{}, {"time": 1e99, "step": "x", "kind": None, "text": 3}, {"step": 5}])
    write_rows(run / "goodput.jsonl", [{}, {"kind": "end", "seconds": 3}])
    (run / "config.json").write_text("{")
    assert "not JSON" in read(run).text


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>'\"&--><!--</title>"


def test_no_text_of_a_run_becomes_markup(tmp_path):
    plain = read(make_run(tmp_path / "plain"))
    run = make_run(tmp_path / HOSTILE.replace("/", "|"), name=HOSTILE)
    rows = list(read_lines(run / "metrics.jsonl"))
    rows[0] |= {"title": HOSTILE, "layers": [HOSTILE] * 3, "device": HOSTILE, HOSTILE: HOSTILE}
    rows[0]["facts"] = {HOSTILE: {HOSTILE: HOSTILE}, "sources": [HOSTILE]}
    write_rows(run / "metrics.jsonl", rows)
    write_rows(run / "incidents.jsonl", [{"time": 1.0, "step": 2, "kind": HOSTILE, "text": HOSTILE}])
    write_rows(
        run / "goodput.jsonl",
        [{"kind": "start", "session": 1, "time": 9.0, "step": 0, "seconds": {HOSTILE: 4.0, "step": 1.0}}],
    )
    (run / "checkpoints" / HOSTILE.replace("/", "|")).mkdir(parents=True)
    found = read(run)
    assert found.text.count("<script>alert(1)") >= 10
    assert [tag for tag, _ in found.tags if tag in ("script", "img", "title")] == ["title", "script", "script"]
    assert found.scripts[1] == plain.scripts[1]
    assert {name for _, attributes in found.tags for name in attributes if name.startswith("on")} == set()


def test_nothing_is_loaded_and_no_other_script_runs(tmp_path):
    found = read(make_run(tmp_path / "run"))
    for tag, attributes in found.tags:
        assert not {"src", "srcset", "action", "background", "data", "poster"} & set(attributes), tag
        assert re.fullmatch(r"#\w+|data:,", attributes.get("href", "#a")), attributes
    files = [(Path(page.__file__).parent / f"page.{kind}").read_text() for kind in ("html", "css", "js")]
    for word in ("//cdn", "http:", "https:", "@import", "url(", "fetch", "XMLHttp", "import(", "innerHTML", "eval("):
        assert not any(word in text.replace("url(#", "") for text in files), word
    (policy,) = [a["content"] for _, a in found.tags if "http-equiv" in a]
    digest_ = base64.b64encode(hashlib.sha256(found.scripts[1].encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; script-src 'sha256-{digest_}';")


@pytest.mark.skipif(shutil.which("node") is None, reason="no JavaScript here")
def test_the_script_is_javascript():
    subprocess.run(["node", "--check", Path(page.__file__).parent / "page.js"], check=True)


def test_the_page_of_a_large_run_stays_small(tmp_path):
    run, draw = make_run(tmp_path / "run"), np.random.default_rng(0)
    layers, experts = 61, 384
    loads = [json.dumps(draw.integers(0, 999, (layers, experts)).tolist()) for _ in range(2)]
    names = ("loss", "grad_norm", "tokens_per_s", "learning_rate", "balance_loss", "mtp_weight", "bias_update_speed")
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, 2001):
            row = dict(zip(names, draw.random(len(names)).tolist()), mtp_loss=[1.23456, 2.3], tokens=step * 1000)
            row |= {"kind": "train", "step": step, "time": step, "max_vio": draw.random(layers).tolist()}
            file.write(f'{json.dumps(row)[:-1]}, "load": {loads[step % 2] if step % 20 < 2 else "null"}}}\n')
            row = {"kind": "eval", "step": step, "heldout_nats": row["loss"], "heldout_bpb": row["grad_norm"]}
            file.write(json.dumps(row) + "\n")
    with (run / "incidents.jsonl").open("w") as file:
        file.writelines(
            json.dumps({"time": k, "step": k, "kind": "spike", "text": "x" * 5000}) + "\n" for k in range(2000)
        )
    html = page.page(run)
    assert len(html) <= 5_000_000
    found = Reader(html)
    assert "a point is the mean of 2 rows" in found.text
    assert "The last 500 of 2,000" in found.text
    assert len(found.data["loads"]["steps"]) * layers * experts <= digest.LOAD_BYTES


def test_the_command_writes_the_page_and_refuses_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs/tiny")

    def run(*args):
        return CliRunner().invoke(cli, ["report", *args], prog_name="dsjax")

    assert run("runs/tiny").exit_code == 0
    assert "differ from the preset" in (tmp_path / "runs/tiny/report.html").read_text()
    result = run("runs/tiny", "--out", "tiny.html")
    assert result.stderr == f"dsjax: tiny.html: {page.size((tmp_path / 'tiny.html').stat().st_size)}\n"
    for args, line in [
        (["runs/tinny"], "runs/tinny: no such run folder; the nearest is runs/tiny"),
        (["runs"], "runs: expected a run folder, and this folder has no config.json"),
        (["runs/tiny", "--out=runs"], "--out=runs: expected a file"),
    ]:
        result = run(*args)
        assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"dsjax: {line}\n")
    result = run("runs/tiny", "--out=nowhere/a.html")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_command_brings_no_jax(tmp_path):
    make_run(tmp_path / "run")
    script = f"""
import sys
from dsjax.cli import cli
try:
    cli.main(["report", {str(tmp_path / "run")!r}])
finally:
    print([name for name in ("jax", "flax", "orbax", "matplotlib") if name in sys.modules])
"""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr
    assert (tmp_path / "run/report.html").exists()
