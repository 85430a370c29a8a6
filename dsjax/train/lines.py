"""Rows of a run's .jsonl files, read one at a time and without JAX: a run may have gigabytes of them."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic_core


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file, none if there is no file. What a kill or a bad disk left of a line is passed over."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        for line in file:
            try:
                row = pydantic_core.from_json(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row


def number(value: Any) -> float | None:
    """A finite number, else None: null stands for NaN, and an old or damaged row may lack it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer beyond all floats
        return None
