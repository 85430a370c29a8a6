"""Runs that are killed, at any moment and with any signal, end as if they had not been."""

import contextlib
import random
import signal
import subprocess
import time
from importlib.util import find_spec

import pytest
import runs

from dsjax.config import DataConfig

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Programs compiled once for all processes."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory):
    """A run that nothing disturbed, and the file of its configuration."""
    folder = tmp_path_factory.mktemp("whole")
    texts = runs.write_texts(folder / "texts")
    data = DataConfig(sources=(str(texts),), heldout_fraction=0.1)  # a tokenizer is trained
    config = runs.micro(texts, data=data, steps=60, log_every=4, eval_every=12, checkpoint_every=5)
    path = runs.write_config(config, folder / "micro.json")
    started = time.monotonic()
    result = runs.dsjax("train", path, "--run", folder / "run", "--quiet", env=runs.environment(cache))
    assert result.returncode == 0, result.stderr
    return folder / "run", path, config, time.monotonic() - started


def train_and_stop(path, folder, env, number: signal.Signals, moment) -> tuple[int, str]:
    """Starts or resumes a run, sends a signal when `moment(folder)` is true, and waits: (exit code, what it said)."""
    with runs.started("train", path, "--run", folder, "--quiet", env=env) as process:
        while process.poll() is None and not moment(folder):
            time.sleep(0.002)
        process.send_signal(number)
        _, said = process.communicate(timeout=300)
        return process.returncode, said


def after(seconds: float):
    begin = time.monotonic()
    return lambda _: time.monotonic() - begin > seconds


def while_writing(folder) -> bool:
    """While a checkpoint is half there."""
    return any("tmp" in path.name for path in folder.glob("checkpoints/*"))


def while_reading(folder) -> bool:
    """While the tokenizer is trained or the text encoded."""
    return (folder / "data").exists()


def at_row(n: int, delay: float = 0.0):
    """When n more rows of metrics are there, and a little later."""
    first, since = None, None

    def moment(folder) -> bool:
        nonlocal first, since
        now = len(runs.rows(folder))
        first = now if first is None else min(first, now)
        if now >= first + n and since is None:
            since = time.monotonic()
        return since is not None and time.monotonic() - since > delay

    return moment


def finish(whole, folder, env) -> None:
    """The run ends as the undisturbed one: metrics, TensorBoard and every bit of the state."""
    reference, path, config, _ = whole
    result = runs.dsjax("train", path, "--run", folder, "--quiet", env=env)
    assert result.returncode == 0, result.stderr
    runs.assert_same_run(reference, folder, config)
    assert (folder / "loss.png").read_bytes() == (reference / "loss.png").read_bytes()
    if find_spec("tensorboard"):
        assert runs.scalars(folder, "train/loss") == runs.scalars(reference, "train/loss")
        assert [step for step, _ in runs.scalars(folder, "train/loss")] == list(range(4, 61, 4))
    leftovers = [p.name for p in folder.rglob("*") if "tmp" in p.name or ".part" in p.name or p.name.startswith(".")]
    assert not leftovers


def test_a_run_that_is_killed_and_stopped_goes_on(whole, cache, tmp_path):
    env = runs.environment(cache)
    _, path, _, _ = whole
    code, _ = train_and_stop(path, tmp_path, env, signal.SIGKILL, while_writing)
    assert code == -signal.SIGKILL
    code, said = train_and_stop(path, tmp_path, env, signal.SIGTERM, at_row(2, 0.05))
    assert code == 0, said
    assert f"`dsjax train {tmp_path}` goes on from there" in said
    assert "Traceback" not in said
    finish(whole, tmp_path, env)


def test_a_run_killed_ten_times_at_random_ends_the_same(whole, cache, tmp_path):
    env, draw = runs.environment(cache), random.Random(time.time_ns())
    _, path, _, seconds = whole
    moments = [
        after(draw.uniform(0, 1)),
        while_reading,
        after(draw.uniform(0, seconds)),
        while_writing,
        at_row(1, draw.uniform(0, 0.5)),
        at_row(draw.randint(1, 4), draw.uniform(0, 0.2)),
        while_writing,
        after(draw.uniform(0, seconds)),
        at_row(draw.randint(1, 4), draw.uniform(0, 0.2)),
        after(draw.uniform(0, seconds)),
    ]
    for moment in moments:
        code, said = train_and_stop(path, tmp_path, env, signal.SIGKILL, moment)
        assert code in (-signal.SIGKILL, 0), said
    finish(whole, tmp_path, env)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_at_random_moments_end_a_run_cleanly(whole, cache, tmp_path, number):
    env, draw = runs.environment(cache), random.Random(time.time_ns())
    _, path, _, _ = whole
    for moment in (at_row(1, draw.uniform(0, 0.5)), while_writing):
        code, said = train_and_stop(path, tmp_path, env, number, moment)
        assert code == 0, said
        assert "goes on from there" in said and "Traceback" not in said
    finish(whole, tmp_path, env)


# A program that kills itself when Python is about to do something to a path: an event of `sys.audit` and a part of its
# first argument.
KILL_AT = """
import os, signal, sys
event, part = sys.argv.pop(1), sys.argv.pop(1)
def hook(name, args):
    if name == event and part in str(args[0]):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
from dsjax.cli import main
main()
"""
PHASES = {
    "before the first byte": ("os.mkdir", "checkpoints/10.orbax"),
    "while its items are written": ("open", "checkpoints/10.orbax"),
    "before it takes its name": ("os.rename", "checkpoints/10.orbax"),
    "while the oldest makes room": ("shutil.rmtree", "checkpoints/5"),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_kill_at_each_phase_of_a_save(whole, cache, tmp_path, phase):
    env, (_, path, _, _) = runs.environment(cache), whole
    command = [runs.MAIN[0], "-c", KILL_AT, *PHASES[phase], "train", str(path), "--run", str(tmp_path), "--quiet"]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == -signal.SIGKILL, result.stderr
    steps = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
    assert max(steps) >= (5 if "10" in PHASES[phase][1] else 10)
    finish(whole, tmp_path, env)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("no right to mount a small file system here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_disk_that_fills_up_costs_nothing_but_the_checkpoints_since(whole, cache, small_disk):
    env, (_, path, _, _) = runs.environment(cache), whole
    run, filler = small_disk / "run", small_disk / "filler"
    with runs.started("train", path, "--run", run, "--quiet", env=env) as process:
        while not (run / "checkpoints" / "10").is_dir():
            time.sleep(0.002)
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        _, said = process.communicate(timeout=300)
    assert process.returncode == 2 and "Traceback" not in said, said
    *_, last = said.splitlines()
    assert "could not be written (No space left on device); the older ones are intact" in said
    assert "step 60/60" in said, "the run went on to its end"
    assert last.startswith("dsjax: ") and "step 60 is not saved (No space left on device)" in last
    filler.unlink()
    finish(whole, run, env)


def test_a_damaged_newest_checkpoint_costs_what_was_since_the_one_before(whole, cache, tmp_path):
    env, (_, path, _, _), draw = runs.environment(cache), whole, random.Random(time.time_ns())
    train_and_stop(path, tmp_path, env, signal.SIGTERM, at_row(8))
    newest = max((p for p in (tmp_path / "checkpoints").iterdir()), key=lambda p: int(p.name))
    files = sorted(p for p in newest.glob("*/ocdbt.process_0/d/*") if p.stat().st_size > 1000)
    damaged = draw.choice(files)
    data = bytearray(damaged.read_bytes())
    if draw.random() < 0.5:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    else:
        del data[draw.randrange(len(data)) :]
    damaged.write_bytes(data)
    finish(whole, tmp_path, env)


# Rows of the data that never come, as from a file server that does not answer.
STALLED = """
import threading
from dsjax.data.pipeline import TrainRows
read = TrainRows.__getitem__
TrainRows.__getitem__ = lambda self, row: threading.Event().wait() if row >= 200 else read(self, row)
from dsjax.cli import main
main()
"""


@pytest.mark.parametrize("stop", ["by itself", "by SIGTERM"])
def test_a_stalled_source_ends_the_process_and_costs_nothing(whole, cache, tmp_path, stop):
    env, (_, path, _, _) = runs.environment(cache), whole
    limit = "2" if stop == "by itself" else "600"
    options = ["--faults.stall-warn-s=0.5", f"--faults.stall-stop-s={limit}"]
    command = [runs.MAIN[0], "-c", STALLED, "train", str(path), "--run", str(tmp_path), "--quiet", *options]
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
        said = ""
        while "waiting for data.sources=" not in said:
            said = process.stderr.readline()
            assert said, "it ended before it waited"
        if stop == "by SIGTERM":
            process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
    if stop == "by SIGTERM":
        assert process.returncode == 0 and "SIGTERM: saved at step 25" in said
    else:
        assert process.returncode == 2 and "does not answer; the same command goes on" in said.splitlines()[-1]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir() if int(p.name) > 20] == ["25"]
    finish(whole, tmp_path, env)
