"""Checkpoints: flat dictionaries of arrays under our own names, written by Orbax in the background, all or nothing.

A checkpoint has three items: `model` (weights, their average, router bias), which inference reads alone, `rest`
(optimizer state and counters), and `notes` (metrics since the last row of them). The data position is the step.
"""

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax import P

from dsjax.config import Config, ConfigError
from dsjax.precision import weight_name
from dsjax.state import TrainState
from dsjax.train.leaves import chunking
from dsjax.train.step import init_state

_MODEL = ("model", "ema", "router_bias")
for name in ("absl", "asyncio"):  # Orbax tells of every step it takes; what fails, it raises as well
    logging.getLogger(name).setLevel(logging.CRITICAL)
_DISK = ("No space left on device", "Disk quota exceeded", "Read-only file system", "Permission denied")


class Checkpoints:
    """The checkpoints of a run folder. A context manager: leaving waits for what is being written."""

    def __init__(self, run_folder: Path, keep: int | None = None, read_only: bool = False):
        self.folder = _folder(run_folder)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
            # In the background a folder that cannot be made is an error only after minutes of waiting for it.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        if read_only and not has_checkpoint(run_folder):
            raise ConfigError(f"{run_folder}: no checkpoint here yet; `dsjax train {run_folder}` makes one")
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            self.manager.close()
        except Exception as error:
            if kind is None:  # else the first error is the one to tell
                raise ConfigError(f"{self.folder}: not written ({_reason(error)})") from error

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self.manager.latest_step()

    def save(self, step: int, state: TrainState, notes: dict[str, Any]) -> None:
        """Writes the state and notes (plain values) in the background; the state may be donated at once.

        A step that is there already is kept. Raises ConfigError if this or the last checkpoint cannot be written.
        """
        if step in self.manager.all_steps():
            return
        model, rest = _split(state)
        args = ocp.args.Composite(
            model=ocp.args.StandardSave(model, save_args=_in_chunks(model)),
            rest=ocp.args.StandardSave(rest),
            notes=ocp.args.JsonSave(notes),
        )
        with self._writing():
            self.manager.save(step, args=args)

    def wait(self) -> None:
        """Returns when everything is on disk. Raises ConfigError if it cannot be written."""
        with self._writing():
            self.manager.wait_until_finished()

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """State, laid out as `like` (arrays or ShapeDtypeStructs with shardings), and notes of a step.

        Raises ConfigError if it cannot be read.
        """
        model, rest = _split(like)
        items = self._read(
            step,
            model=ocp.args.StandardRestore(model),
            rest=ocp.args.StandardRestore(rest),
            notes=ocp.args.JsonRestore(),
        )
        return _fill(like, {**items["model"], **items["rest"]}), items["notes"]

    def weights_alone(self, step: int) -> bool:
        """Whether the checkpoint is imported weights, with no optimizer state."""
        return _weights_alone(self.folder / str(step))

    def find(self, step: int | None) -> int:
        """This step, or the newest one for None. Raises ConfigError if there is no such checkpoint."""
        steps = sorted(self.manager.all_steps())
        if not steps or (step is not None and step not in steps):
            wanted = "a checkpoint" if step is None else f"checkpoint {step}"
            raise ConfigError(
                f"{self.folder.parent}: expected {wanted}, there are: {', '.join(map(str, steps)) or 'none'}"
            )
        return steps[-1] if step is None else step

    def restore_model(self, step: int | None, like: TrainState) -> TrainState:
        """As restore, for the newest step by default and without the optimizer's state, whose leaves stay `like`'s.

        Raises ConfigError if there is no such checkpoint, or if it cannot be read.
        """
        model, _ = _split(like)
        return _fill(like, self._read(self.find(step), model=ocp.args.StandardRestore(model))["model"])

    def _read(self, step: int, **items) -> Any:
        try:
            return self.manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:
            raise ConfigError(
                f"{self.folder / str(step)}: this checkpoint is damaged, or of another configuration "
                f"({_reason(error)}); remove it to go on from an older one"
            ) from error

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except Exception as error:
            raise ConfigError(
                f"{self.folder}: a checkpoint could not be written ({_reason(error)}); the older ones are intact"
            ) from error


def has_checkpoint(run_folder: Path) -> bool:
    """Whether the folder holds a complete checkpoint. Their folders are named by step; unfinished ones otherwise."""
    folder = _folder(run_folder)
    return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())


def imported(run_folder: Path) -> bool:
    """Whether the folder holds imported weights that no step was trained from yet."""
    folder = _folder(run_folder)
    return has_checkpoint(run_folder) and all(_weights_alone(p) for p in folder.iterdir() if p.name.isdigit())


def abstract_state(config: Config, mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state on `mesh`, with no array made."""
    return abstract(lambda: init_state(config), mesh)


def abstract(make: Callable[[], Any], mesh) -> Any:
    """The same of whatever `make` makes."""

    def on_mesh(a):  # eval_shape names an abstract mesh, or nothing when replicated; Orbax needs devices
        sharding = jax.NamedSharding(mesh, a.sharding.spec if a.sharding else P())
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)

    with jax.set_mesh(mesh):
        return jax.tree.map(on_mesh, jax.eval_shape(make))


def names(tree) -> list[str]:
    """The name of every leaf, in order: "model/moe/attn/wo"."""
    return [weight_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _folder(run_folder: Path) -> Path:
    return Path(run_folder).absolute() / "checkpoints"


def _in_chunks(flat: dict[str, Any]) -> dict[str, ocp.SaveArgs]:
    chunks = {name: chunking(name, a) for name, a in flat.items()}
    return {name: ocp.SaveArgs(shard_axes=axes, chunk_byte_size=most) for name, (axes, most) in chunks.items()}


def _weights_alone(step_folder: Path) -> bool:
    # One of the items missing is damage; an import writes step 0 with neither.
    return step_folder.name == "0" and not any((step_folder / item).exists() for item in ("rest", "notes"))


def _reason(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return next((reason for reason in _DISK if reason in text), text.split("\n")[0][:300])


def _split(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    # Orbax refuses arrays without elements, such as the bias of no MTP layers.
    flat = {name: a for name, a in zip(names(state), jax.tree.leaves(state)) if a.size}
    model = {name: a for name, a in flat.items() if name.split("/")[0] in _MODEL}
    return model, {name: a for name, a in flat.items() if name not in model}


def _fill(like: TrainState, arrays: dict[str, jax.Array]) -> TrainState:
    def leaf(name, a):
        if name in arrays:
            return arrays[name]
        if a.size:
            return a
        return jax.make_array_from_callback(a.shape, a.sharding, lambda index: np.zeros(a.shape, a.dtype)[index])

    leaves = [leaf(name, a) for name, a in zip(names(like), jax.tree.leaves(like))]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
