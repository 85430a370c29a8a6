"""What a run says of itself: metrics.jsonl, TensorBoard event files and loss.png, the same numbers in all three."""

import contextlib
import errno
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from dsjax.files import replacing, write_text
from dsjax.state import Metrics
from dsjax.train.events import EventFile
from dsjax.train.journal import Lines
from dsjax.train.lines import read_lines

DRAW_EVERY_S = 60


class Interval:
    """The steps since the last row of metrics, in plain values.

    A checkpoint keeps them as `notes`, so that a run resumed between two rows writes the row it would have written.
    """

    def __init__(self, notes: dict[str, Any] | None = None):
        self.steps: list[dict[str, Any]] = notes["steps"] if notes else []
        self.load: list[list[int]] = notes["load"] if notes else []  # [layers + depth, E] tokens of all steps

    def add(self, metrics: Metrics) -> None:
        """One more step, of host arrays."""
        load = np.concatenate([metrics.load.moe, metrics.load.mtp]).astype(np.int64)
        self.load = (load + np.reshape(self.load, load.shape) if self.steps else load).astype(int).tolist()
        names = ("loss", "mtp_loss", "balance_loss", "grad_norm", "max_vio", "overflow", "skipped", "skipped_in_a_row")
        self.steps.append({name: np.asarray(getattr(metrics, name)).tolist() for name in names})

    @property
    def notes(self) -> dict[str, Any]:
        return {"steps": self.steps, "load": self.load}

    def row(self) -> dict[str, Any]:
        """Means over the steps that were not skipped, loads of all."""
        taken = [step for step in self.steps if not step["skipped_in_a_row"]] or self.steps
        names = ("loss", "mtp_loss", "balance_loss", "grad_norm", "max_vio")
        means = {name: np.mean([step[name] for step in taken], axis=0).tolist() for name in names}
        return {
            **means,
            "max_vio_mean": float(np.mean(means["max_vio"])) if means["max_vio"] else 0.0,
            "load": self.load,
            "overflow": sum(step["overflow"] for step in self.steps),
            "skipped": self.steps[-1]["skipped"],
        }


class Recorder:
    """Writes rows of metrics, {"kind": "run" | "train" | "eval", "step": ..., ...}.

    A run that resumes at a step loses the rows after it: they will be written again. TensorBoard's file is written
    anew from the rows at every start. Without `write`, as on all processes but the first, rows are only held. A full
    disk loses nothing: what could not be written is, as soon as it can be.
    """

    def __init__(self, run_folder: Path, step: int, write: bool = True):
        self.folder, self.writes = run_folder, write
        self.path = run_folder / "metrics.jsonl"
        self.rows = list(read_lines(self.path))
        self.drawn_at = -math.inf
        self.lines: Lines | None = None
        self.board: EventFile | None = None
        self.rewind(step)

    def rewind(self, step: int) -> None:
        """Forgets the rows after a step."""
        self.close()
        self.rows = [row for row in self.rows if row["step"] <= step] if step else []
        if not self.writes:
            return
        write_text(self.path, "".join(map(_line, self.rows)))
        self.lines = Lines(self.path)
        self._to_board()

    def write(self, kind: str, step: int, values: dict[str, Any]) -> dict[str, Any]:
        """One row; its numbers go to TensorBoard as kind/name. NaN and infinities, which JSON lacks, become null."""
        row = {"kind": kind, "step": step, "time": round(time.time(), 3), **_finite(values)}
        self.rows.append(row)
        if self.writes:
            self.lines.add(row)
            self._to_board(row)
        return row

    def last(self, kind: str) -> dict[str, Any] | None:
        """The newest row of a kind."""
        return next((row for row in reversed(self.rows) if row["kind"] == kind), None)

    def draw(self, at_once: bool = False) -> None:
        """loss.png of all rows so far; not more often than every DRAW_EVERY_S, unless at once."""
        if not self.writes or (not at_once and time.monotonic() - self.drawn_at < DRAW_EVERY_S):
            return
        from dsjax.train.picture import draw  # here: matplotlib is slow to import

        with no_room(), replacing(self.folder / "loss.png") as file:
            draw(self.rows, file)
        self.drawn_at = time.monotonic()

    def close(self) -> None:
        if self.lines is not None:
            self.lines.close()
        self._close_board()

    def _to_board(self, *rows: dict[str, Any]) -> None:
        """Adds rows; all, to a new file, where there is none or the disk was full."""
        try:
            if self.board is None:
                rows, self.board = self.rows, _new_event_file(self.folder / "tensorboard")
            for row in rows:
                numbers = {
                    f"{row['kind']}/{name}": float(value)
                    for name, value in row.items()
                    if isinstance(value, int | float) and name not in ("step", "time")
                }
                self.board.add(row["step"], numbers, row["time"])
            self.board.flush()
        except OSError:
            self._close_board()

    def _close_board(self) -> None:
        with no_room():
            if self.board is not None:
                self.board.close()
        self.board = None


@contextlib.contextmanager
def no_room():
    """What cannot be written here is left out."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _new_event_file(folder: Path) -> EventFile:
    """An event file whose name sorts after those before it, which it replaces."""
    folder.mkdir(exist_ok=True)
    old = sorted(folder.glob("events.out.tfevents.*.dsjax"))
    number = max([int(time.time()), *(int(path.name.split(".")[3]) + 1 for path in old)])
    file = EventFile(folder / f"events.out.tfevents.{number}.dsjax")
    for path in old:
        path.unlink()
    return file
