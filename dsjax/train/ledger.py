"""The ledger of what a run passes over: rows of the data that a rollback leaves behind, for good.

    {"step": 812, "from_step": 792, "rows": [50688, 52032], "time": ..., "why": "loss 9.1, median 2.3"}

A line of skipped.jsonl is one rollback. Rows are those of the data, so that a second rollback does not move the first.
"""

import json
from pathlib import Path
from typing import Any

from dsjax.files import write_text
from dsjax.train import processes


class Ledger:
    """The rollbacks of a run, and which row of the data its n-th row is."""

    def __init__(self, run_folder: Path):
        self.path = run_folder / "skipped.jsonl"
        text = processes.from_first(lambda: self.path.read_text() if self.path.exists() else "")
        self.entries: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]

    def __len__(self) -> int:
        return len(self.entries)

    def row(self, n: int) -> int:
        """The row of the data that the run's n-th row is."""
        for start, stop in self.passed():
            if n < start:
                break
            n += stop - start
        return n

    def passed(self) -> list[tuple[int, int]]:
        """[start, stop) of the rows that are passed over: rising, and apart from each other."""
        spans: list[tuple[int, int]] = []
        for start, stop in sorted(tuple(entry["rows"]) for entry in self.entries):
            if spans and start <= spans[-1][1]:
                spans[-1] = spans[-1][0], max(stop, spans[-1][1])
            else:
                spans.append((start, stop))
        return spans

    def add(self, entry: dict[str, Any], write: bool) -> None:
        """One more rollback: on disk, whole, before anything is done about it."""
        self.entries.append(entry)
        if not write:
            return
        write_text(self.path, "".join(json.dumps(e) + "\n" for e in self.entries))

    def stale_after(self, known: int) -> int | None:
        """The last step that a checkpoint from when the ledger had `known` entries may be of; None = any."""
        return min((entry["from_step"] for entry in self.entries[known:]), default=None)


class Passing:
    """Rows of the data as the run sees them: rows[n] is the data's row ledger.row(n)."""

    def __init__(self, rows, ledger: Ledger):
        self.rows, self.ledger = rows, ledger

    def __getitem__(self, n: int):
        return self.rows[self.ledger.row(n)]
