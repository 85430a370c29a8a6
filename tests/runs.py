"""The smallest training run that has every part, in this process or in its own; and what it leaves behind."""

import contextlib
import functools
import os
import random
import subprocess
import sys
from pathlib import Path

import jax
import models
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from dsjax.config import Config, DataConfig, FaultsConfig, OptimizerConfig, replace, save
from dsjax.train.checkpoint import Checkpoints, abstract_state
from dsjax.train.lines import read_lines
from sharding.mesh import make_mesh

WORDS = ["def", "return", "self", "naïve", "日本", "x =", "(1234)", "\n    ", "import", "for i in range(10):\n    "]
CLOCKS = ("time", "tokens_per_s", "input_s")  # what differs between two runs of the same numbers
MAIN = [sys.executable, "-c", "from dsjax.cli import main; main()"]


LOOP_ONLY = dict(steps=1, log_every=1, eval_every=1, checkpoint_every=1, keep_checkpoints=1, max_skipped_steps=1)
LOOP_ONLY |= dict(keep_every=None, keep_best=0)
SCHEDULE_ONLY = dict(peak_lr=1, warmup_steps=0, schedule="constant", phases=())


def essence(config: Config) -> Config:
    """What the compiled programs of a run depend on."""
    spikes = {name: getattr(config.faults, name) for name in ("spike_window", "spike_norm", "spike_loss")}
    faults = FaultsConfig(on_spike="note" if config.faults.on_spike == "note" else "skip", **spikes)
    host = dict(ema_decay=None, ema_on="device") if config.optimizer.ema_on == "host" else {}  # no matter of the step's
    optimizer = replace(config.optimizer, **SCHEDULE_ONLY, **host)
    return replace(config, **LOOP_ONLY, optimizer=optimizer, faults=faults)


@functools.cache
def _like(config: Config, mesh):
    return abstract_state(config, mesh)


def like(config: Config, mesh):
    """The abstract state of a run, traced once."""
    state = _like(essence(config), mesh)
    return state if config.optimizer.ema_decay is None else state.replace(ema=state.model)


def write_texts(folder: Path, n: int = 40, seed: int = 0) -> Path:
    folder.mkdir()
    draw = random.Random(seed)
    for i in range(n):
        text = f"{i} {' '.join(draw.choices(WORDS, k=draw.choice([20, 60, 150])))}\n"
        (folder / f"{i:03}.txt").write_text(text, encoding="utf-8")
    return folder


def micro(texts: Path, **changes) -> Config:
    """Two layers, bytes for tokens, six steps; rows of metrics and checkpoints do not fall together."""
    base = Config(
        name="micro",
        steps=6,
        batch_size=8,
        seq_len=32,
        log_every=2,
        eval_every=3,
        checkpoint_every=3,
        model=models.v3(vocab_size=262, num_hidden_layers=2, max_position_embeddings=96, initializer_range=0.02),
        optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=2, schedule="cosine"),
        data=DataConfig(sources=(str(texts),), tokenizer="bytes", heldout_fraction=0.1),
        compute=models.COMPUTE,
    )
    return replace(base, **changes)


def rows(run_folder: Path) -> list[dict]:
    """Rows of metrics but for what a clock says."""
    return [
        {name: v for name, v in row.items() if name not in CLOCKS}
        for row in read_lines(run_folder / "metrics.jsonl")
        if row["kind"] != "run"
    ]


def state(run_folder: Path, config: Config, step: int | None = None) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by name, the newest by default."""
    mesh = make_mesh(jax.devices()[:1])
    with jax.set_mesh(mesh), Checkpoints(run_folder, read_only=True) as checkpoints:
        state, _ = checkpoints.restore(checkpoints.find(step), like(config, mesh))
    return models.named_leaves(state)


def assert_same_run(a: Path, b: Path, config: Config) -> None:
    """Metrics, and the whole state at the end, are equal bit for bit."""
    assert rows(a) == rows(b)
    first, second = state(a, config), state(b, config)
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


def scalars(run_folder: Path, tag: str) -> list[tuple[int, float]]:
    """(step, value) as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(run_folder / "tensorboard"))
    reader.Reload()
    return [(event.step, event.value) for event in reader.Scalars(tag)]


@contextlib.contextmanager
def compiled_once(tmp_path_factory):
    """Compiled programs are kept on disk for all tests of a session, whichever process they run in."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    settings = {"jax_compilation_cache_dir": str(base / "compiled"), "jax_persistent_cache_min_compile_time_secs": 0.0}
    old = {name: getattr(jax.config, name) for name in settings}
    for values in (settings, old):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is settings:
            yield


def environment(cache: Path, devices: int = 1) -> dict[str, str]:
    """Of a process with this many CPU devices, whose compiled programs are kept for the next one."""
    flags = os.environ["XLA_FLAGS"] + f" --xla_force_host_platform_device_count={devices}"
    return os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }


@contextlib.contextmanager
def started(*args: str, env: dict[str, str], **options):
    """A `dsjax` process, which does not outlive the block."""
    process = subprocess.Popen(
        [*MAIN, *map(str, args)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def dsjax(*args: str, env: dict[str, str], timeout: float = 300, **options) -> subprocess.CompletedProcess:
    return subprocess.run([*MAIN, *map(str, args)], env=env, capture_output=True, text=True, timeout=timeout, **options)


def write_config(config: Config, path: Path) -> Path:
    save(config, path)
    return path
