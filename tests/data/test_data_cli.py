"""`dsjax data`: what it makes, shows and refuses."""

import shutil

import pytest
from click.testing import CliRunner

import configs
from dsjax.cli import cli
from dsjax.config import DataConfig, replace, save
from dsjax.data.pipeline import load_corpus, train_rows
from dsjax.data.tokenizer import bytes_tokenizer


def run(*args):
    return CliRunner().invoke(cli, [str(a) for a in args], prog_name="dsjax", env={"COLUMNS": "100"})


@pytest.fixture(scope="module")
def built(texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "out"
    result = run("data", "build", texts, out, "--workers=1", "--heldout-fraction", "0.1", "--quiet")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.startswith(f"dsjax: {out}: ") and "`dsjax train PRESET --data.sources=" in result.stderr
    return out


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def test_inspect_shows_numbers_documents_and_a_row_with_the_parts_of_fim(built):
    result = run("data", "inspect", built, "--fim-rate=1", "--n=2", "--seq-len=900", "--packing=best_fit")
    assert result.exit_code == 0, result.output
    text = result.stdout
    assert "262 tokens" in text and "documents" in text and "=== document 2, " in text and "=== row 0: " in text
    for part in ("prefix", "suffix", "middle"):
        assert f"[{part}:]" in text and f"[:{part}]" in text


def test_inspect_shows_text_and_a_run_as_it_trains(built, texts, tmp_path):
    plain = run("data", "inspect", texts, "--n=1", "--seq-len=64")
    assert plain.exit_code == 0 and "=== row 0: 64 of 64 tokens" in plain.stdout and "[prefix:]" not in plain.stdout
    config = configs_tiny(built)
    save(config, tmp_path / "config.json")
    load_corpus(config.data, config.model.vocab_size, tmp_path)
    wanted = train_rows(load_corpus(config.data, config.model.vocab_size, tmp_path), config.data, 40, config.seed)[5]
    shown = run("data", "inspect", tmp_path, "--n=0", "--row=5", "--seq-len=40", "--chars=1000")
    assert shown.exit_code == 0, shown.output
    first = bytes_tokenizer().decode(wanted["tokens"][wanted["segment_ids"] == 1])
    assert "".join(c for c in first if c.isprintable() or c in "\n\t").split()[0] in shown.stdout


def configs_tiny(built):
    config = configs.load("tiny")
    return replace(config, data=DataConfig(sources=(str(built),)))


def test_verify_names_the_damaged_in_one_line(built, tmp_path):
    assert run("data", "inspect", built, "--verify").stdout.endswith("2 shards are as their manifest says\n")
    shutil.copytree(built, tmp_path / "out")
    path = tmp_path / "out" / "heldout-000000.array_record"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    result = run("data", "inspect", tmp_path / "out", "--n=0")  # a run would not start either
    assert result.exit_code == 2 and "heldout-000000.array_record: sha256" in result.stderr
    result = run("data", "inspect", tmp_path / "out", "--verify")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "1 of 2 shards are damaged: " in result.stderr and "heldout-000000.array_record: " in result.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("data build stdlib", "SOURCES: missing; see `dsjax data build --help`"),
        ("data build {texts} {tmp}/a --split-rate=2", "--split-rate=2: expected a number between 0 and 1"),
        ("data build {tmp}/none {tmp}/a", "data.sources={tmp}/none: no such file or folder"),
        ("data build {tmp}/bad.jsonl {tmp}/a", "{tmp}/bad.jsonl line 1: not JSON"),
        ("data build {texts} {tmp}/a --tokenizer={tmp}/none", "data.tokenizer={tmp}/none: no such file"),
        ("data inspect {texts} --verify", "--verify: expected a folder of shards, and {texts} is text"),
        ("data inspect {tmp}/none", "data.sources={tmp}/none: no such file or folder"),
    ],
)
def test_a_mistake_is_one_line(line, message, texts, tmp_path):
    (tmp_path / "bad.jsonl").write_text("{\n")
    result = run(*line.format(texts=texts, tmp=tmp_path).split())
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("dsjax: " + message.format(texts=texts, tmp=tmp_path)), result.stderr
