"""Runs that are killed, at any moment and with any signal, end as if they had not been."""

import random
import signal
import time
from importlib.util import find_spec

import pytest
import runs

from dsjax.config import DataConfig


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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_at_random_moments_end_a_run_cleanly(whole, cache, tmp_path, number):
    env, draw = runs.environment(cache), random.Random(time.time_ns())
    _, path, _, _ = whole
    for moment in (at_row(1, draw.uniform(0, 0.5)), while_writing, at_row(2, draw.uniform(0, 0.5))):
        code, said = train_and_stop(path, tmp_path, env, number, moment)
        assert code == 0, said
        assert "goes on from there" in said and "Traceback" not in said
    finish(whole, tmp_path, env)
