"""A run that goes on from another one: the same network with longer rows, a new schedule, other text.

What it begins with is the newest checkpoint of that run, whole: weights, their average, router bias and the optimizer's
moments; or, where it is to learn something else (`dsjax sft`), weights and router bias alone. `from.json` in the run
folder says which. The first thing written is a checkpoint of step 0, and from then on it is a run like any other.
"""

import contextlib
import fcntl
import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dsjax import config as configuration
from dsjax.config import Config, ConfigError, replace, show
from dsjax.data.tokenizer import TEXT_FILES
from dsjax.files import write_json
from dsjax.state import TrainState
from dsjax.train.checkpoint import Checkpoints, abstract_state, has_checkpoint, newest_step
from dsjax.train.folder import differences, take_lock
from dsjax.train.spikes import new_history
from dsjax.train.step import start_state

_MAY_DIFFER = ("model.rope_scaling", "model.max_position_embeddings")  # of the network
_FILE = "from.json"


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a run began with."""

    run: str  # its folder, absolute
    step: int
    weights_alone: bool = False  # of it weights and router bias, and moments of zero; else all


def origin(run_folder: Path) -> Origin | None:
    """Where the run in a folder came from; None for one that began with new weights."""
    path = run_folder / _FILE
    return Origin(**json.loads(path.read_text())) if path.exists() else None


def begin(
    config: Config, run_folder: Path, source: Path | None, explicit: dict[str, Any], weights_alone: bool = False
) -> Config:
    """The configuration of a run that begins with the newest checkpoint of `source`, whose tokenizer is put in place.

    A folder that holds a checkpoint needs nothing of its source any more; one that was to begin with another run and
    came to no checkpoint still does. Raises ConfigError where `source` is no run, is being trained, has another network
    or is not what the folder's run began with.
    """
    known = origin(run_folder)
    if has_checkpoint(run_folder):
        if source is not None and (known is None or known.run != str(source.absolute())):
            came = "new weights" if known is None else f"{known.run}, step {known.step}"
            raise ConfigError(f"{source}: the run in {run_folder} began with {came}; choose another --run")
        return config
    if source is None and known is None:
        return config
    source = Path(known.run) if source is None else source
    if source.absolute() == run_folder.absolute():
        raise ConfigError(f"{source}: expected another folder than that of --run")
    if not (source / "config.json").is_file() or not has_checkpoint(source):
        raise ConfigError(f"{source}: expected a run folder with a checkpoint")
    for name, (was, value) in differences(configuration.load(source / "config.json"), config).items():
        if name.startswith("model.") and not name.startswith(_MAY_DIFFER):
            raise ConfigError(
                f"{name}={show(value)}: the run in {source} has {show(was)}; of its network only rope_scaling and "
                "max_position_embeddings may change"
            )
    if explicit.get("data.tokenizer", "run") != "run":
        raise ConfigError(
            f"data.tokenizer={show(explicit['data.tokenizer'])}: expected run, the tokenizer is that of {source}"
        )
    if jax.process_index() == 0:
        _take_over(source, run_folder, weights_alone or (known is not None and known.weights_alone))
    return replace(config, data=replace(config.data, tokenizer="run"))


def _take_over(source: Path, run_folder: Path, weights_alone: bool) -> None:
    if not (source / "tokenizer.json").is_file():
        raise ConfigError(f"{source}: tokenizer.json is missing; `dsjax train {source}` makes it again")
    with _not_in_training(source):
        found = Origin(str(source.absolute()), newest_step(source), weights_alone)
        for name in TEXT_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, run_folder / name)
    write_json(run_folder / _FILE, asdict(found))


def first_state(came: Origin, config: Config, mesh, say: Callable[[str], None]) -> TrainState:
    """The state before step 0 from the checkpoint it came from, on `mesh`. Weights alone get moments of zero, and so
    do imported ones.

    Where the configuration keeps averaged weights and the checkpoint has none, they begin as its weights.
    """
    source = Path(came.run)
    say(f"starting from step {came.step} of {source}")
    old = configuration.load(source / "config.json")
    optimizer = replace(config.optimizer, ema_decay=old.optimizer.ema_decay)
    kept = replace(config, optimizer=optimizer, faults=old.faults)
    with _not_in_training(source), Checkpoints(source, read_only=True) as checkpoints:
        checkpoints.find(came.step)
        imported = checkpoints.weights_alone(came.step)
        if imported or came.weights_alone:
            like = abstract_state(kept, mesh)
            given = checkpoints.restore_model(came.step, like.replace(ema=None) if imported else like)
            start = jax.jit(functools.partial(start_state, config=config), donate_argnums=(0, 1))
            return start(given.model, given.router_bias)
        state, _ = checkpoints.restore(came.step, abstract_state(kept, mesh))
    if config.optimizer.ema_decay is None:
        state = state.replace(ema=None)
    elif state.ema is None:
        state = state.replace(ema=jax.tree.map(jnp.copy, state.model))
    zero = jnp.zeros_like(state.step)
    counts = {"step": zero, "skipped": jnp.copy(zero), "skipped_in_a_row": jnp.copy(zero)}
    return state.replace(**counts, history=new_history(config.faults))


@contextlib.contextmanager
def _not_in_training(source: Path):
    """Holds the run's lock as its readers do. A folder that nobody ever trained in has none."""
    if not (source / "lock").exists():
        yield
        return
    with (source / "lock").open() as lock:
        take_lock(lock, fcntl.LOCK_SH, f"{source}: another process is training there; wait until it ends")
        yield
