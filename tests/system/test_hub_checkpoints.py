"""A user's way with a Hub checkpoint: import it, talk to it, train it further, hand it back."""

import json
import shutil
import subprocess
import sys

import checkpoints
import numpy as np
import pytest
from click.testing import CliRunner

import dsjax
from dsjax.cli import cli
from dsjax.data.tokenizer import bytes_tokenizer
from dsjax.hub.files import open_folder

CFG = checkpoints.replace(checkpoints.KINDS["deepseek_v3"], vocab_size=264)


def run(*args):
    result = CliRunner().invoke(cli, [str(a) for a in args], prog_name="dsjax")
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def refused(*args) -> str:
    result = CliRunner().invoke(cli, [str(a) for a in args], prog_name="dsjax")
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == "" and result.stderr.startswith("dsjax: ") and result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """An FP8 V3 with MTP, a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("hub") / "My-V3"
    checkpoints.write(folder, checkpoints.quantised(checkpoints.draw(CFG), CFG), CFG, shard_bytes=100_000)
    bytes_tokenizer().save(folder / "tokenizer.json")
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    special = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder


@pytest.fixture(scope="module")
def imported(hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "mine"
    result = run("convert", "import", hub, folder)
    assert f"dsjax generate {folder}" in result.stdout
    return folder


def test_both_formats_write_the_same_text(hub, imported):
    options = ("--prompt", "def ", "--temperature=0", "--max-tokens=12")
    text = run("generate", hub, *options).stdout
    assert text and run("generate", imported, *options).stdout == text


def test_a_chat_is_the_prompt_in_its_template(hub, imported):
    options = ("--temperature=0", "--max-tokens=12")
    chat = run("generate", imported, "--chat", "--system", "Short.", "--prompt", "Who?", *options).stdout
    assert chat == run("generate", hub, "--prompt", "system: Short.\nuser: Who?\n", *options).stdout
    assert "expected --chat" in refused("generate", hub, "--system", "Short.", "--prompt", "Who?")


def test_the_library_takes_either_format(hub, imported):
    tokens = np.random.default_rng(0).integers(0, CFG.vocab_size, (2, 9))
    a, b = (dsjax.logits(dsjax.load(folder), tokens) for folder in (hub, imported))
    assert a.shape == (2, 9, CFG.vocab_size) and a.dtype == np.float32
    np.testing.assert_array_equal(a, b)


def test_the_import_exports_to_the_same_bytes(hub, imported, tmp_path):
    run("convert", "export", imported, tmp_path / "out", "--fp8")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (hub / file).read_bytes()
    theirs, ours = open_folder(hub), open_folder(tmp_path / "out")
    assert theirs.keys() == ours.keys()
    for name, stored in theirs.items():
        assert stored.read(...).tobytes() == ours[name].read(...).tobytes(), name


@pytest.mark.slow
def test_it_is_trained_further_and_handed_back(imported, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(imported, mine)
    (tmp_path / "notes.txt").write_text("def return self\n" * 200)
    options = ("--quiet", "--steps=2", "--seq-len=16", "--batch-size=8", f"--data.sources={tmp_path / 'notes.txt'}")
    result = run("train", mine, *options, "--optimizer.warmup-steps=0", "--optimizer.peak-lr=0.01")
    assert f"starting from the weights in {mine}" in result.output
    rows = [json.loads(line) for line in (mine / "metrics.jsonl").read_text().splitlines()]
    assert next(row for row in rows if row["kind"] == "train")["step"] == 2
    assert (mine / "tokenizer.json").read_bytes() == (imported / "tokenizer.json").read_bytes()
    run("convert", "export", mine, tmp_path / "out", "--dtype=float32")
    before, after = (dsjax.load(folder, "float32") for folder in (imported, tmp_path / "out"))
    tokens = np.arange(16)[None]
    change = np.abs(dsjax.logits(after, tokens) - dsjax.logits(before, tokens)).max()
    assert 1e-3 < change < 10
    np.testing.assert_array_equal(dsjax.logits(dsjax.load(mine, "float32"), tokens), dsjax.logits(after, tokens))
    message = refused("train", mine, "--data.tokenizer=bytes")
    assert "cannot change it" in message
    assert "model.hidden_size=64" in refused("train", imported, "--model.hidden-size=64")


def test_a_conversion_that_is_ended_leaves_nothing(hub, tmp_path):
    script = "import time; from dsjax.hub.checkpoint import HubCheckpoint; from dsjax.cli import main\n"
    script += "HubCheckpoint.read = lambda *_: (print('reading', flush=True), time.sleep(3))\nmain()"
    command = [sys.executable, "-c", script, "convert", "import", hub, tmp_path / "out"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "reading\n"
    assert len(list(tmp_path.iterdir())) == 1
    process.terminate()
    assert process.wait(timeout=90) == 143
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_is_told_in_one_line(hub, imported, tmp_path):
    assert "is there already" in refused("convert", "import", hub, imported)
    assert "no such run folder" in refused("convert", "export", tmp_path / "nothing", tmp_path / "out")
    assert "nowhere" in refused("convert", "import", tmp_path / "nowhere", tmp_path / "out")
    assert "the nearest is import" in refused("convert", "improt", hub, tmp_path / "out")
    assert "float16" in refused("convert", "import", hub, tmp_path / "out", "--dtype=float16")
    assert "no run folder" in refused("generate", hub, "--prompt=a", "--checkpoint=3")
    config = json.loads((hub / "config.json").read_text())
    broken = tmp_path / "broken"
    shutil.copytree(hub, broken)
    (broken / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    for command in (("generate", broken, "--prompt=a"), ("convert", "import", broken, tmp_path / "out")):
        assert "hidden_act=gelu: not supported; expected silu" in refused(*command)
    assert not (tmp_path / "out").exists()
