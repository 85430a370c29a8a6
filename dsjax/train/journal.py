"""What a run keeps of its own course: where wall time went (goodput.jsonl), and what happened (incidents.jsonl).

    {"kind": "start" | "interval" | "end", "session": 2, "time": ..., "step": 40, "seconds": {"step": 8.1, ...}}
    {"time": ..., "step": 40, "kind": "spike", "text": "..."}

A session is one start of the process. Files are only ever added to, so that they tell of restarts, too.
"""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from dsjax.train.lines import read_lines


class Lines:
    """A file of JSON lines that outlives a full disk: what could not be written waits, and is written later.

    Without `write`, as on all processes but the first, nothing is.
    """

    def __init__(self, path: Path, write: bool = True):
        self.waiting: list[bytes] = []
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666) if write else None
        if self.fd is not None:
            self.end = self._whole()

    def add(self, row: dict[str, Any]) -> bool:
        """One line; whether it, and all before it, are in the file."""
        if self.fd is None:
            return True
        self.waiting.append((json.dumps(row, allow_nan=False) + "\n").encode())
        data = b"".join(self.waiting)
        try:
            written = os.pwrite(self.fd, data, self.end)
            if written < len(data):  # the disk is full: a part of a line would spoil those after it
                os.ftruncate(self.fd, self.end)
                return False
        except OSError:
            return False
        self.end, self.waiting = self.end + written, []
        return True

    def close(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def _whole(self) -> int:
        """Where the last whole line ends; a line cut short by a kill is cut off."""
        size = os.fstat(self.fd).st_size
        tail = os.pread(self.fd, 1 << 20, max(0, size - (1 << 20)))
        end = size - (len(tail) - tail.rfind(b"\n") - 1)
        os.ftruncate(self.fd, end)
        return end


class Goodput:
    """The ledger of wall time. Time that no span covers is the step's."""

    def __init__(self, run_folder: Path, write: bool = True):
        path = run_folder / "goodput.jsonl"
        self.lines = Lines(path, write)
        last = list(read_lines(path))[-1:] if write else []
        self.session = last[0]["session"] + 1 if last else 1
        self.seconds: dict[str, float] = {}
        self.since = time.monotonic()

    def start(self, step: int, restart_s: float) -> None:
        """The loop begins, so many seconds after the process."""
        self._row("start", step, {"restart": restart_s})

    @contextlib.contextmanager
    def span(self, category: str):
        """What happens inside counts as `category`; may stand inside another span, from which it is taken."""
        begin, inner = time.monotonic(), sum(self.seconds.values())
        try:
            yield
        finally:
            spent = time.monotonic() - begin - (sum(self.seconds.values()) - inner)
            self.seconds[category] = self.seconds.get(category, 0.0) + max(0.0, spent)

    def interval(self, step: int, kind: str = "interval") -> dict[str, float]:
        """A row of the time since the last one; its seconds by category."""
        wall = time.monotonic() - self.since
        seconds = self.seconds | {"step": max(0.0, wall - sum(self.seconds.values()))}
        self._row(kind, step, seconds)
        return seconds

    def close(self, step: int) -> None:
        self.interval(step, "end")
        self.lines.close()

    def _row(self, kind: str, step: int, seconds: dict[str, float]) -> None:
        rounded = {name: round(s, 4) for name, s in seconds.items()}
        time_ = round(time.time(), 3)
        self.lines.add({"kind": kind, "session": self.session, "time": time_, "step": step, "seconds": rounded})
        self.seconds, self.since = {}, time.monotonic()


class Incidents:
    """What happened to a run that no plan foresaw."""

    def __init__(self, run_folder: Path, write: bool = True):
        self.lines = Lines(run_folder / "incidents.jsonl", write)

    def add(self, step: int, kind: str, text: str) -> None:
        self.lines.add({"time": round(time.time(), 3), "step": step, "kind": kind, "text": text})

    def close(self) -> None:
        self.lines.close()
