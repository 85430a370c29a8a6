"""Checkpoints: flat dictionaries of arrays under our own names, written by Orbax in the background, whole or not at all.

A checkpoint has two items: `model` (weights, their average, router bias), which inference reads alone, and `rest`
(optimizer state and counters). The data position is the step.
"""

import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax import P

from dsjax.config import Config, ConfigError
from dsjax.precision import weight_name
from dsjax.state import TrainState
from dsjax.train.step import init_state

_MODEL = ("model", "ema", "router_bias")
logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells of every step it takes


class Checkpoints:
    """The checkpoints of a run folder. A context manager: leaving waits for what is being written."""

    def __init__(self, run_folder: Path, keep: int | None = None, read_only: bool = False):
        self.folder = Path(run_folder).absolute() / "checkpoints"
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, read_only=read_only, cleanup_tmp_directories=not read_only
        )
        if read_only and not self.folder.is_dir():
            raise ConfigError(f"{run_folder}: expected checkpoints, and this run has none yet; train it first")
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.manager.close()

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self.manager.latest_step()

    def save(self, step: int, state: TrainState) -> None:
        """Writes the state in the background; it may be donated at once. A step that is there already is kept."""
        if step in self.manager.all_steps():
            return
        model, rest = _split(state)
        args = ocp.args.Composite(model=ocp.args.StandardSave(model), rest=ocp.args.StandardSave(rest))
        self.manager.save(step, args=args)

    def wait(self) -> None:
        """Returns when everything is on disk."""
        self.manager.wait_until_finished()

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of a step, laid out as `like` (arrays or ShapeDtypeStructs with shardings)."""
        model, rest = _split(like)
        arrays = self._read(step, model=model, rest=rest)
        return _fill(like, {**arrays["model"], **arrays["rest"]})

    def restore_model(self, step: int | None, like: TrainState) -> TrainState:
        """As restore, for the newest step by default and without optimizer state, whose leaves stay those of `like`.

        Raises ConfigError if there is no such checkpoint.
        """
        steps = self.manager.all_steps()
        if not steps or (step is not None and step not in steps):
            wanted = "a checkpoint" if step is None else f"checkpoint {step}"
            there = ", ".join(map(str, sorted(steps))) or "none"
            raise ConfigError(f"{self.folder.parent}: expected {wanted}, there are: {there}")
        model, _ = _split(like)
        return _fill(like, self._read(max(steps) if step is None else step, model=model)["model"])

    def _read(self, step: int, **items: dict[str, Any]) -> dict[str, dict[str, jax.Array]]:
        args = ocp.args.Composite(**{name: ocp.args.StandardRestore(like) for name, like in items.items()})
        try:
            return self.manager.restore(step, args=args)
        except Exception as error:
            reason = str(error).split("\n")[0][:300]
            raise ConfigError(
                f"{self.folder / str(step)}: this checkpoint cannot be read ({reason}); delete it to go on from an older one"
            ) from error


def abstract_state(config: Config, mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state on `mesh`, with no array made."""

    def on_mesh(a):  # eval_shape names an abstract mesh, or nothing when replicated; Orbax needs devices
        sharding = jax.NamedSharding(mesh, a.sharding.spec if a.sharding else P())
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)

    with jax.set_mesh(mesh):
        return jax.tree.map(on_mesh, jax.eval_shape(lambda: init_state(config)))


def names(tree) -> list[str]:
    """The name of every leaf, in order: "model/moe/attn/wo"."""
    return [weight_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _split(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    # Orbax refuses arrays without elements, such as the bias of no MTP layers.
    flat = {name: a for name, a in zip(names(state), jax.tree.leaves(state)) if a.size}
    model = {name: a for name, a in flat.items() if name.split("/")[0] in _MODEL}
    return model, {name: a for name, a in flat.items() if name not in model}


def _fill(like: TrainState, arrays: dict[str, jax.Array]) -> TrainState:
    def leaf(name, a):
        if name in arrays:
            return arrays[name]
        return jax.numpy.zeros(a.shape, a.dtype) if not a.size else a

    leaves = [leaf(name, a) for name, a in zip(names(like), jax.tree.leaves(like))]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
