"""A user's first hour through the real command line: train, look, measure, generate."""

import json
import re
import shlex
import shutil

import jax
import pytest
import runs
from click.testing import CliRunner
from matplotlib.image import imread

from dsjax.cli import cli
from dsjax.train import layout
from dsjax.train.lines import read_lines


def run(*args: str, **options):
    result = CliRunner().invoke(cli, [str(a) for a in args], prog_name="dsjax", **options)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(*args: str, **options) -> str:
    result = run(*args, **options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("dsjax: ") and result.stderr.count("\n") == 1
    return result.stderr.strip()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run by the command line, and what it said."""
    folder = tmp_path_factory.mktemp("first light")  # a path that needs quotes
    texts = runs.write_texts(folder / "texts")
    path = runs.write_config(runs.micro(texts, log_every=10, eval_every=20), folder / "micro.json")
    with runs.compiled_once(tmp_path_factory), pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(layout, "devices", lambda: jax.devices()[:1])
        result = run("train", path, "--run", folder / "my run", "--steps=40")
        yield folder / "my run", result


def test_training_says_what_it_does(trained):
    folder, result = trained
    assert (result.exit_code, result.stdout) == (0, "")
    for line in (
        r"corpus     .*texts \(Python 3\.\d+\.\d+\)",
        r"sha256     [0-9a-f]{64}",
        r"training   32 documents, [\d,]+ bytes, [\d,]+ tokens",
        r"held out   8 documents, [\d,]+ bytes, [\d,]+ tokens",
        r"to beat    gzip -9 \d\.\d{3} bits a byte, xz -9 \d\.\d{3}, on the held-out text",
        r"tokenizer  bytes, 262 tokens, 1\.00 bytes a token",
        r"model      42\.4K parameters, of which a token uses 24\.8K; 20\.0K more for MTP",
        r"steps      40 of 8 x 32 tokens: 10\.2K tokens, \d\.\d\d times the training text",
        r"devices    1 cpu device",
        r"compiling the training step ...",
        r"step 20/40: loss \d\.\d{4}, lr .*, MaxVio \d\.\d\d, .* tok/s, input \d+ ms, \d:\d\d left",
        r"step 20    held-out loss \d\.\d{4} nats a token, .* \(gzip -9 \d\.\d{3}, xz -9 \d\.\d{3}\)",
        r"step 20: sample '.*' -> '.*'",
        r"checkpoint .*my run/checkpoints/40",
        r"pictures   .*loss.png, or tensorboard --logdir '.*my run'/tensorboard",
        r"generate   dsjax generate '.*my run' --prompt \"def \" --max-tokens 80",
    ):
        assert re.search(f"^{line}$", result.stderr, re.MULTILINE), line
    losses = [row["loss"] for row in read_lines(folder / "metrics.jsonl") if row["kind"] == "train"]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 1
    assert imread(folder / "loss.png").shape == (935, 1430, 4)


def test_the_printed_command_generates(trained):
    _, result = trained
    (command,) = re.findall(r"^generate +dsjax (.*)$", result.stderr, re.MULTILINE)
    first = run(*shlex.split(command))
    assert first.exit_code == 0 and first.stdout
    assert run(*shlex.split(command)).stdout == first.stdout  # the seed decides
    assert run(*shlex.split(command), "--seed=1").stdout != first.stdout


def test_generation_takes_its_prompt_from_everywhere(trained):
    folder, _ = trained
    options = ("generate", folder, "--max-tokens", "8")
    text = run(*options, "--prompt", "def ").stdout
    assert run(*options, input="def \n").stdout == text
    assert run(*options, "--prompt", "-", input="def ").stdout == text
    assert run(*options, "--prompt", "").exit_code == 0  # from nothing but the beginning of a document
    assert run(*options, "--prompt", "日本 🙂").exit_code == 0
    assert run(*options, "--prompt", "def ", "--checkpoint", "39").exit_code == 0
    assert "expected checkpoint 3, there are: 39, 40" in refused(*options, "--prompt", "x", "--checkpoint", "3")


def test_generation_refuses_in_one_line(trained, tmp_path):
    folder, _ = trained
    too_long = refused("generate", folder, "--prompt", "def ", "--max-tokens=95")
    assert "max_tokens=95: expected at most 91 after a prompt of 5 tokens" in too_long
    assert "prompt" in refused("generate", folder, "--prompt", "x" * 200)
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "tokenizer.json").unlink()
    assert "tokenizer.json is missing; `dsjax train" in refused("generate", copy, "--prompt", "x")
    shutil.rmtree(copy / "checkpoints")
    assert "no checkpoint here yet; `dsjax train" in refused("generate", copy, "--prompt", "x")
    assert "no checkpoint here yet; `dsjax train" in refused("eval", copy)


def test_evaluation_repeats_the_runs_own_numbers(trained):
    folder, _ = trained
    logged = [row for row in read_lines(folder / "metrics.jsonl") if row["kind"] == "eval"][-1]
    result = json.loads(run("eval", folder, "--json").stdout)
    assert (result["step"], result["heldout_bpb"]) == (40, logged["heldout_bpb"])
    assert run("eval", folder).stdout.split()[4:6] == ["heldout_bpb", f"{logged['heldout_bpb']:.4f}"]


def test_evaluation_on_other_text(trained, tmp_path):
    folder, _ = trained
    (tmp_path / "other.txt").write_text("def return self\n" * 20)
    result = json.loads(run("eval", folder, "--json", f"--data.sources={tmp_path / 'other.txt'}").stdout)
    assert (result["heldout_bytes"], result["heldout_documents"]) == (320, 1)
    assert "no such file or folder" in refused("eval", folder, "--data.sources=nowhere.txt")


def test_training_again_goes_on(trained):
    folder, _ = trained
    assert "40 of 40 steps are done" in run("train", folder).stderr
    assert "has 32 and cannot change it" in refused("train", folder, "--model.hidden-size=64")


def test_a_run_folder_that_cannot_be_written(trained, tmp_path):
    folder, _ = trained
    (tmp_path / "file").write_text("")
    assert "Not a directory" in refused("train", folder.parent / "micro.json", "--run", tmp_path / "file/run")


def test_a_reader_that_goes_away_ends_the_writing(trained, tmp_path):
    """`dsjax generate ... | head -c 1`"""
    folder, _ = trained
    env = runs.environment(tmp_path)
    with runs.started("generate", folder, "--prompt", "x", "--max-tokens=80", env=env) as process:
        process.stdout.close()
        assert process.wait(timeout=300) == 1
        assert process.stderr.read() == ""
        process.stdout = None
