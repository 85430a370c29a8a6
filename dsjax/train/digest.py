"""What a page needs of a run's metrics: curves and expert loads, thinned out to a size that a browser likes.

Rows are read once and one at a time, so that the loads of thousands of rows, layers and experts need little memory.
"""

import base64
from collections.abc import Iterable
from typing import Any

import numpy as np

from dsjax.train.lines import number

POINTS = 1000  # of a curve
LOAD_BYTES = 2_200_000  # of all expert loads, one byte a layer, expert and column
LOAD_COLUMNS = 400
UNKNOWN = 255  # the byte of a load that is not known


class Digest:
    """The rows of a metrics.jsonl: `run`, `train` and `held`, without their loads, and `loads`."""

    def __init__(self, rows: Iterable[dict[str, Any]]):
        self.run: dict[str, Any] = {}
        train: dict[int, dict[str, Any]] = {}
        held: dict[int, dict[str, Any]] = {}
        self.loads = Loads()
        for row in rows:
            step = number(row.get("step"))
            if row.get("kind") == "run":
                self.run = row
            elif row.get("kind") == "train" and step is not None:
                self.loads.add(int(step), row.pop("load", None))
                train[int(step)] = row
            elif row.get("kind") == "eval" and step is not None:
                held[int(step)] = row
        self.train = [train[step] for step in sorted(train)]
        self.held = [held[step] for step in sorted(held)]
        self.bins = _bins([int(row["step"]) for row in self.train], POINTS)
        self.held_bins = _bins([int(row["step"]) for row in self.held], POINTS)

    @property
    def step(self) -> int:
        """Steps done, by the last row."""
        return max((int(row["step"]) for rows in (self.train, self.held) for row in rows[-1:]), default=0)

    @property
    def layers(self) -> list[str]:
        names, n = self.run.get("layers"), max(self.loads.layers, self._width("max_vio"))
        fits = isinstance(names, list) and len(names) == n
        return [str(name)[:40] for name in names] if fits else [f"expert layer {k + 1}" for k in range(n)]

    def curve(self, name: str, k: int | None = None) -> dict[str, list] | None:
        """Of training rows: mean, and lowest and highest where a point stands for several rows; None without numbers.

        `k` picks from a list.
        """
        return self._thin(_column(self.train, name, k), self.bins)

    def held_curve(self, name: str) -> dict[str, list] | None:
        return self._thin(_column(self.held, name), self.held_bins)

    @property
    def steps(self) -> dict[str, list[int]]:
        """The step of every point: that of the last row it stands for."""
        both = (("train", self.train, self.bins), ("eval", self.held, self.held_bins))
        return {kind: [int(rows[b.stop - 1]["step"]) for b in bins] for kind, rows, bins in both}

    def rewards(self) -> list[str] | None:
        """The parts of the reward, if the rows are of policy optimisation."""
        if not any("reward" in row for row in self.train) and not any("heldout_reward" in row for row in self.held):
            return None
        names = [name for row in self.train[-1:] for name in row if name.startswith("reward_")]
        return [name.removeprefix("reward_") for name in names]

    def passes(self) -> list[str]:
        """pass_1, pass_2, pass_4 and so on, as far as they were measured."""
        names = {name for row in self.held for name in row if name.startswith("pass_") and name[5:].isdecimal()}
        return sorted(names, key=lambda name: int(name[5:]))

    def depth(self) -> int:
        return self._width("mtp_loss")

    def batch_tokens(self) -> dict[str, list] | None:
        """Tokens a step, from the tokens so far."""
        tokens, steps = _column(self.train, "tokens"), _column(self.train, "step")
        more = np.diff(tokens, prepend=0.0) / np.maximum(np.diff(steps, prepend=0.0), 1)
        return self._thin(np.where(more >= 0, more, np.nan), self.bins)

    def violation(self) -> dict[str, list] | None:
        """MaxVio: mean, lowest and highest of the layers, and every layer by itself."""
        n = self._width("max_vio")
        values = np.stack([_column(self.train, "max_vio", k) for k in range(n)]) if n else np.zeros((0, 0))
        if not np.isfinite(values).any():
            return None
        known = np.isfinite(values).any(0)
        low, mean, high = (np.full(values.shape[1], np.nan) for _ in range(3))
        low[known], high[known] = np.nanmin(values[:, known], 0), np.nanmax(values[:, known], 0)
        mean[known] = np.nanmean(values[:, known], 0)
        thin = {name: _means(v, self.bins, f) for name, v, f in [("lo", low, np.min), ("hi", high, np.max)]}
        layers = [_digits(_means(v, self.bins), 3) for v in values] if n * len(self.bins) <= 150_000 else []
        return {
            "y": _digits(_means(mean, self.bins)),
            "lo": _digits(thin["lo"]),
            "hi": _digits(thin["hi"]),
            "layers": layers,
        }

    def _width(self, name: str) -> int:
        return max((len(row[name]) for row in self.train if isinstance(row.get(name), list)), default=0)

    def _thin(self, values: np.ndarray, bins: list[slice]) -> dict[str, list] | None:
        if not np.isfinite(values).any():
            return None
        thin = {"y": _digits(_means(values, bins))}
        if len(bins) < len(values):
            thin |= {"lo": _digits(_means(values, bins, np.min)), "hi": _digits(_means(values, bins, np.max))}
        return thin


class Loads:
    """Tokens of every expert, summed over ever more rows as more come, so that there are at most twice the columns."""

    def __init__(self):
        self.sums: list[np.ndarray] = []  # [layers, experts] tokens
        self.steps: list[int] = []  # the last step of each column
        self.rows = 1  # that a column stands for
        self.pending = 0  # rows of the last column
        self.shape: tuple[int, int] | None = None

    @property
    def layers(self) -> int:
        return self.shape[0] if self.shape else 0

    @property
    def limit(self) -> int:
        return max(1, min(LOAD_COLUMNS, LOAD_BYTES // (self.shape[0] * self.shape[1])))

    def add(self, step: int, load: Any) -> None:
        """One more row; what is no table of the first one's shape, or of an earlier step, is passed over."""
        try:
            counts = np.array(load, float)
        except (TypeError, ValueError):
            return
        if counts.ndim != 2 or not counts.size or (self.steps and step <= self.steps[-1]):
            return
        self.shape = self.shape or counts.shape
        if counts.shape != self.shape:
            return
        if 0 < self.pending < self.rows:
            self.sums[-1] += counts
            self.steps[-1] = step
            self.pending += 1
            return
        if len(self.sums) == 2 * self.limit:
            self.sums = [a + b for a, b in zip(self.sums[::2], self.sums[1::2])]
            self.steps = self.steps[1::2]
            self.rows *= 2
        self.sums.append(counts)
        self.steps.append(step)
        self.pending = 1

    def packed(self) -> dict[str, Any] | None:
        """Load over the layer's mean as a byte, [layers][experts][columns] in base64.

        0 is no load, b in 1..254 is 2^((b - 128) / 16), a grid of 4.4%; UNKNOWN is where a layer had no tokens.
        """
        if not self.shape:
            return None
        sums, steps, rows = self.sums, self.steps, self.rows
        if len(sums) > self.limit:  # up to twice as many are kept on the way
            sums = [sum(sums[k : k + 2]) for k in range(0, len(sums), 2)]
            steps, rows = [steps[min(k + 1, len(steps) - 1)] for k in range(0, len(steps), 2)], 2 * rows
        counts = np.stack(sums, -1)  # [layers, experts, columns]
        mean = counts.mean(1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            share = counts / mean
            codes = np.where(share > 0, np.clip(np.round(16 * np.log2(share) + 128), 1, 254), 0)
        codes = np.where(np.isfinite(share) & (share >= 0), codes, UNKNOWN).astype(np.uint8)
        return {
            "steps": steps,
            "rows": rows,
            "experts": self.shape[1],
            "bytes": base64.b64encode(codes.tobytes()).decode(),
        }


def _bins(steps: list[int], n: int) -> list[slice]:
    """At most n stretches of the rows, of one length but for the last."""
    size = -(-len(steps) // n) or 1
    return [slice(k, min(k + size, len(steps))) for k in range(0, len(steps), size)]


def _column(rows: list[dict[str, Any]], name: str, k: int | None = None) -> np.ndarray:
    """Values with NaN for what is null, missing or no number."""
    cells = [row.get(name) for row in rows]
    if k is not None:
        cells = [cell[k] if isinstance(cell, list) and k < len(cell) else None for cell in cells]
    values = np.array([c if type(c) is float or (type(c) is int and abs(c) < 2**63) else np.nan for c in cells], float)
    return np.where(np.isfinite(values), values, np.nan)


def _means(values: np.ndarray, bins: list[slice], of=np.mean) -> np.ndarray:
    """Of the numbers in each bin; NaN where it has none."""
    found = ((part := values[b])[np.isfinite(part)] for b in bins)
    return np.array([of(part) if part.size else np.nan for part in found])


def _digits(values: np.ndarray, digits: int = 5) -> list[float | None]:
    """Numbers of so many digits, null for NaN."""
    return [float(f"{v:.{digits}g}") if np.isfinite(v) else None for v in values]
