"""Checkpoints: flat dictionaries of arrays under our own names, written by Orbax in the background, all or nothing.

A checkpoint has three items: `model` (weights, their average, router bias), which inference reads alone, `rest`
(optimizer state and counters), and `notes` (metrics since the last row of them, and the sum of every leaf, to which
what is read back is held). The data position is the step.
"""

import contextlib
import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax import P
from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

from dsjax.config import Config, ConfigError
from dsjax.precision import weight_name
from dsjax.state import TrainState
from dsjax.train import processes
from dsjax.train.leaves import LeafFolder, chunking
from dsjax.train.step import init_state
from dsjax.train.verify import Samples, check_samples, differing, leaf_sums, take_samples

T = TypeVar("T")
_MODEL = ("model", "ema", "router_bias")
for name in ("absl", "asyncio"):  # Orbax tells of every step it takes; what fails, it raises as well
    logging.getLogger(name).setLevel(logging.CRITICAL)
_DISK = ("No space left on device", "Disk quota exceeded", "Read-only file system", "Permission denied")


class Checkpoints:
    """The checkpoints of a run folder. A context manager: leaving waits for what is being written.

    The newest `keep` are kept (all for None), those of multiples of `keep_every`, and the `keep_best` of lowest score.
    What goes wrong with one of them is told to `tell(step, text)`, a line each.
    """

    def __init__(
        self,
        run_folder: Path,
        keep: int | None = None,
        *,
        keep_every: int | None = None,
        keep_best: int = 0,
        read_only: bool = False,
        tell: Callable[[int, str], None] | None = None,
    ):
        self.folder = _folder(run_folder)
        self.read_only, self.tell = read_only, tell or (lambda step, text: None)
        self._policy = _policy(keep, keep_every, keep_best)
        self._writing: tuple[int, dict[str, str], Samples] | None = None  # step, items of leaves, what was sampled
        self._checking: tuple[int, threading.Thread] | None = None
        self.problem = ""  # why the last save failed
        self._wrong: list[str] = []  # leaves that the disk does not give back
        if read_only and not has_checkpoint(run_folder):
            raise ConfigError(f"{run_folder}: no checkpoint here yet; `dsjax train {run_folder}` makes one")
        self._open()

    def _open(self) -> None:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy,
            read_only=self.read_only,
            cleanup_tmp_directories=not self.read_only,
            # In the background a folder that cannot be made is an error only after minutes of waiting for it.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            if kind is None:
                self.wait()
            self.manager.close()
        except Exception as error:
            if kind is None:  # else the first error is the one to tell
                raise ConfigError(f"{self.folder}: not written ({_reason(error)})") from error

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self.manager.latest_step()

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, rising."""
        return sorted(self.manager.all_steps())

    def save(self, step: int, state: TrainState, notes: dict[str, Any], score: float | None = None) -> None:
        """Writes the state and notes (plain values) in the background; the state may be donated at once.

        A step that is there already is kept. `score` is what keep_best compares. What cannot be written is told; the
        older checkpoints are intact, and the next save tries anew.
        """
        self.wait()
        if step in self.manager.all_steps():
            return
        model, rest = _split(state)
        flat = {**model, **rest}
        item_of = {**dict.fromkeys(model, "model"), **dict.fromkeys(rest, "rest")}
        args = ocp.args.Composite(
            model=ocp.args.StandardSave(model, save_args=_in_chunks(model)),
            rest=ocp.args.StandardSave(rest),
            notes=ocp.args.JsonSave(notes | {"sums": leaf_sums(flat)}),
        )
        self._writing = step, item_of, take_samples(flat, step)
        try:
            self.manager.save(step, args=args, metrics=None if score is None else {"score": score})
        except Exception as error:
            self._failed(step, _reason(error))

    def settle(self, wait: bool = True) -> None:
        """Sees a save that has ended to its end: told of, if it failed; compared with the disk in a thread, if not.

        Without `wait` a save that is still being written goes on, and so does any of several processes, which have to
        do this at the same step.
        """
        if self._writing is None or (not wait and (jax.process_count() > 1 or self.manager.is_saving_in_progress())):
            return
        step, item_of, samples = self._writing
        problem = None
        try:
            self.manager.wait_until_finished()
        except Exception as error:
            problem = _reason(error)
        if problem := processes.first_problem(problem):
            self._failed(step, problem)
            return
        self._writing = None

        def check():
            self._wrong = check_samples(self.folder / str(step), item_of, samples)

        self._checking = step, threading.Thread(target=check, daemon=True)
        self._checking[1].start()

    def wait(self) -> None:
        """Returns when nothing is being written or compared with the disk; what that found is told."""
        self.settle()
        if self._checking is None:
            return
        (step, thread), self._checking = self._checking, None
        thread.join()
        if wrong := processes.first_problem(_few(self._wrong) or None):
            self.set_aside(step, f"the disk does not give back what was written ({wrong})")

    def expect(self, step: int) -> None:
        """Waits. Raises ConfigError if the newest complete checkpoint is not that of this step."""
        self.wait()
        if self.latest() != step:
            raise ConfigError(
                f"{self.folder.parent}: step {step} is not saved ({self.problem or 'the lines above say why'}); the "
                f"older checkpoints are intact: the same command goes on from step {self.latest() or 0}"
            )

    def _failed(self, step: int, problem: str) -> None:
        self._writing, self.problem = None, problem
        with contextlib.suppress(Exception):  # it repeats the error
            self.manager.close()
        self._open()  # without what was half-written, and with all that is on disk
        self.tell(
            step,
            f"{self.folder}: checkpoint {step} could not be written ({problem}); the older ones are intact "
            f"({_listed(self.steps())}), and the next is tried in its turn",
        )

    def newest(self, read: Callable[[int], T]) -> tuple[int, T] | None:
        """The newest step that `read` can read, and what it gives; None if there is no checkpoint at all.

        Those passed over are told and, once one was read, set aside in the run folder's damaged/. Raises ConfigError
        if there are some and none can be read: they stay where they are.
        """
        passed: list[tuple[int, str]] = []
        for step in reversed(self.steps()):
            try:
                result, problem = read(step), None
            except ConfigError as error:
                result, problem = None, str(error)
            if problem := processes.first_problem(problem):
                passed.append((step, problem))
                continue
            for bad, why in passed:
                self.set_aside(bad, why)
            return step, result
        if passed:
            raise ConfigError(passed[0][1] + ("; so are the older ones" if len(passed) > 1 else ""))
        return None

    def set_aside(self, step: int, why: str) -> None:
        """Moves a checkpoint to damaged/ beside checkpoints/, where nothing reads it, and tells why."""
        where = ""
        if not self.read_only:
            if jax.process_index() == 0:
                place = self.folder.parent / "damaged" / str(step)
                place.parent.mkdir(exist_ok=True)
                shutil.rmtree(place, ignore_errors=True)
                (self.folder / str(step)).rename(place)
            processes.from_first(lambda: "moved")
            self.manager.reload()
            where = f", moved to {self.folder.parent / 'damaged'}"
        self.tell(step, f"checkpoint {step} passed over{where}: {why}")

    def drop_after(self, step: int) -> None:
        """Removes the checkpoints of later steps."""
        self.wait()
        for later in self.steps():
            if later > step:
                self.manager.delete(later)

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """State, laid out as `like` (arrays or ShapeDtypeStructs with shardings), and notes of a step.

        Raises ConfigError if it cannot be read, or is not what was written.
        """
        model, rest = _split(like)
        missing = _unknown_then(self.folder / str(step), rest)
        items = self._read(
            step,
            model=ocp.args.StandardRestore(model),
            rest=ocp.args.StandardRestore({name: a for name, a in rest.items() if name not in missing}),
            notes=ocp.args.JsonRestore(),
        )
        flat, notes = {**items["model"], **items["rest"]}, dict(items["notes"])
        if wrong := differing(flat, notes.pop("sums", {})):
            raise ConfigError(
                f"{self.folder / str(step)}: this checkpoint is damaged: {_few(wrong)} not as written; remove it to go "
                "on from an older one"
            )
        return _fill(like, flat | {name: _unused(a) for name, a in missing.items()}), notes

    def weights_alone(self, step: int) -> bool:
        """Whether the checkpoint is imported weights, with no optimizer state."""
        return _weights_alone(self.folder / str(step))

    def find(self, step: int | None) -> int:
        """This step, or the newest one for None. Raises ConfigError if there is no such checkpoint."""
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            wanted = "a checkpoint" if step is None else f"checkpoint {step}"
            raise ConfigError(f"{self.folder.parent}: expected {wanted}, there are: {_listed(steps)}")
        return steps[-1] if step is None else step

    def restore_model(self, step: int | None, like: TrainState) -> TrainState:
        """As restore, for the newest step by default and without the optimizer's state, whose leaves stay `like`'s.

        Raises ConfigError if there is no such checkpoint, or if it cannot be read.
        """
        model, _ = _split(like)
        args = ocp.checkpoint_utils.construct_restore_args(model)
        asked = ocp.args.PyTreeRestore(model, args, partial_restore=True)  # an average that `like` has not stays there
        folder = self.folder / str(self.find(step))
        # Not by the manager, which reads an item only as it writes it: whole.
        with _readable(folder), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            found = reader.restore(folder / "model", args=asked)
            if missing := [name for name, a in found.items() if not isinstance(a, jax.Array)]:
                raise ValueError(f"it has no {_few(missing)}")
        return _fill(like, found)

    def _read(self, step: int, **items) -> Any:
        with _readable(self.folder / str(step)):
            return self.manager.restore(step, args=ocp.args.Composite(**items))


@contextlib.contextmanager
def _readable(step_folder: Path):
    """Raises ConfigError for a checkpoint that cannot be read."""
    try:
        yield
    except Exception as error:
        raise ConfigError(
            f"{step_folder}: this checkpoint is damaged, or of another configuration ({_reason(error)}); remove it to "
            "go on from an older one"
        ) from error


def has_checkpoint(run_folder: Path) -> bool:
    """Whether the folder holds a complete checkpoint. Their folders are named by step; unfinished ones otherwise."""
    return newest_step(run_folder) is not None


def newest_step(run_folder: Path) -> int | None:
    """The step of the newest complete checkpoint, for one process alone: Checkpoints are opened by all together."""
    folder = _folder(run_folder)
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    return max(steps, default=None)


def imported(run_folder: Path) -> bool:
    """Whether the folder holds imported weights that no step was trained from yet."""
    folder = _folder(run_folder)
    return has_checkpoint(run_folder) and all(_weights_alone(p) for p in folder.iterdir() if p.name.isdigit())


def abstract_state(config: Config, mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state that a checkpoint holds, on `mesh`, with no array made."""
    state = abstract(lambda: init_state(config), mesh)
    return state if config.optimizer.ema_decay is None else state.replace(ema=state.model)


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


def _policy(keep: int | None, keep_every: int | None, keep_best: int):
    policies = [policy.LatestN(keep)]
    if keep_every is not None:
        policies.append(policy.EveryNSteps(keep_every))
    if keep_best:
        best = policy.BestN(
            get_metric_fn=lambda metrics: metrics["score"],
            reverse=True,
            n=keep_best,
            keep_checkpoints_without_metrics=False,
        )
        policies.append(best)
    return policy.AnyPreservationPolicy(policies)


def _unknown_then(step_folder: Path, rest: dict[str, Any]) -> dict[str, Any]:
    """The leaves that a checkpoint of an older version does not have and need not have."""
    try:
        there = LeafFolder(step_folder, "rest").names()
    except ConfigError:  # said when it is read
        return {}
    return {name: a for name, a in rest.items() if name == "history" and name not in there}


def _unused(a) -> jax.Array:
    return jax.make_array_from_callback(a.shape, a.sharding, lambda index: np.full(a.shape, np.nan, a.dtype)[index])


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps)) or "none"


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
