"""The run folder: one process at a time, and one run from its first step to its last."""

import contextlib
import fcntl
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from dsjax import config as configuration
from dsjax.config import Config, ConfigError, show
from dsjax.data.tokenizer import TOKENIZER_FILES, Tokenizer
from dsjax.train.checkpoint import has_checkpoint, imported
from dsjax.train.processes import from_first

# What a run may be resumed with another value of. The rest decides which text a step sees, or the shape of the state.
_RESUMABLE = (
    "steps",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_every",
    "keep_best",
    "max_skipped_steps",
    "data.on_error",
    "data.cache",
    "balance.",
    "mtp.",
    "optimizer.",
    "mesh.",
    "compute.",
    "faults.",
    "grpo.",
)
_FIXED = (
    "optimizer.ema_decay",
    "optimizer.name",
    "optimizer.moments_dtype",
    "faults.spike_window",
    "grpo.task",
    "grpo.objective",
    "grpo.kl_weight",
)


@contextlib.contextmanager
def owned(run_folder: Path):
    """Makes the run folder, and keeps other jobs from training there.

    Of several processes the first one does it, and the others look whether they see the same folder.
    """
    first = jax.process_index() == 0
    if first:
        run_folder.mkdir(parents=True, exist_ok=True)
    with (run_folder / "lock").open("a+") if first else contextlib.nullcontext() as lock:
        if first:
            _lock(lock, run_folder)
            for leftover in run_folder.glob(".*.tmp"):  # of a process killed while it wrote
                leftover.unlink(missing_ok=True)
        written = from_first(lambda: (run_folder / "lock").read_text())
        if not first and _read(run_folder / "lock") != written:
            raise ConfigError(
                f"{run_folder.absolute()}: process {jax.process_index()} does not see what process 0 wrote there; "
                "expected a --run that all processes share"
            )
        yield


def take_lock(lock, kind: int, refusal: str) -> None:
    """Takes an open file's lock, fcntl.LOCK_EX or LOCK_SH. Raises ConfigError(refusal) if another process holds it."""
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(refusal) from None
    except OSError:  # a file system without locks
        pass


def _lock(lock, run_folder: Path) -> None:
    take_lock(lock, fcntl.LOCK_EX, f"{run_folder}: another process is training here; choose another --run")
    lock.truncate(0)
    lock.write(uuid.uuid4().hex)
    lock.flush()
    os.fsync(lock.fileno())


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def adopt(
    config: Config,
    run_folder: Path,
    explicit: dict[str, Any],
    say: Callable[[str], None],
    check: Callable[[Config], None] = lambda config: None,
) -> Config:
    """The configuration to run with, kept in the folder: that of the run it holds, with the explicit changes.

    A folder without a checkpoint holds no run yet: it takes `config` whole. Raises ConfigError for the folder of
    another preset, for a change that would make it another run, and as `check` does; then nothing is kept.
    """
    path = run_folder / "config.json"
    saved = configuration.load(path) if path.exists() else config
    if not has_checkpoint(run_folder):
        if (saved.data, saved.model.vocab_size) != (config.data, config.model.vocab_size):
            _forget_tokenizer(run_folder)
    else:
        if saved.name != config.name:
            raise ConfigError(
                f"{run_folder}: holds a run of preset {saved.name}, not {config.name}; choose another --run"
            )
        config = configuration.override(saved, explicit)
        fresh = imported(run_folder)  # only its network is decided
        for name, (old, new) in differences(saved, config).items():
            if name.startswith("model.") if fresh else name.startswith(_FIXED) or not name.startswith(_RESUMABLE):
                raise ConfigError(
                    f"{name}={show(new)}: the run in {run_folder} has {show(old)} and cannot change it; choose another "
                    "--run"
                )
            say(f"changed: {name} from {show(old)} to {show(new)}")
    check(config)
    if jax.process_index() == 0:
        configuration.save(config, path)
    return config


def run_tokenizer(run_folder: Path) -> Tokenizer:
    """The tokenizer that a run was trained with. Raises ConfigError if it is missing."""
    if not (run_folder / "tokenizer.json").exists():
        raise ConfigError(f"{run_folder}: tokenizer.json is missing; `dsjax train {run_folder}` makes it again")
    return Tokenizer.load(run_folder)


def differences(before: Config, after: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted name -> (old, new) of every field of the run that differs."""
    old, new = (
        {name: value for name, value, _ in configuration.field_rows(c) if not name.startswith("distributed.")}
        for c in (before, after)
    )
    return {name: (old.get(name), new.get(name)) for name in {**old, **new} if old.get(name) != new.get(name)}


def _forget_tokenizer(run_folder: Path) -> None:
    """Removes the tokenizer and tokens of a run that ended before its first checkpoint: nothing needs them."""
    if (run_folder / "data" / "tokenizer.from.json").exists():
        for name in TOKENIZER_FILES:
            (run_folder / name).unlink(missing_ok=True)
        shutil.rmtree(run_folder / "data", ignore_errors=True)
