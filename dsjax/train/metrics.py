"""What a run says of itself: metrics.jsonl, TensorBoard event files and loss.png, the same numbers in all three."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter


class Recorder:
    """Writes rows of metrics, {"kind": "train" | "eval" | "run", "step": ..., ...}.

    A run that resumes at a step loses the rows after it: they will be written again.
    """

    def __init__(self, run_folder: Path, step: int):
        self.folder = run_folder
        self.path = run_folder / "metrics.jsonl"
        self.rows = [row for row in read_rows(self.path) if row["step"] <= step]
        _replace(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self.file = self.path.open("a")
        self.board = SummaryWriter(str(run_folder / "tensorboard"), purge_step=step + 1)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One row; numbers go to TensorBoard under kind/name."""
        row = {"kind": kind, "step": step, **values}
        self.rows.append(row)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self.board.add_scalar(f"{kind}/{name}", value, step)
        self.board.flush()

    def close(self) -> None:
        self.file.close()
        self.board.close()

    def draw(self) -> Path:
        """loss.png of all rows so far."""
        path = self.folder / "loss.png"
        part = path.with_suffix(".part.png")
        draw(self.rows, part)
        os.replace(part, path)
        return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line cut short by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Four panels: loss, held-out bits per byte beside gzip and xz, MaxVio by layer, expert load."""
    from matplotlib.figure import Figure

    train = [row for row in rows if row["kind"] == "train"]
    held = [row for row in rows if row["kind"] == "eval"]
    figure = Figure(figsize=(12, 8), layout="constrained")
    (loss, bits), (violation, load) = figure.subplots(2, 2)

    steps = [row["step"] for row in train]
    loss.plot(steps, [row["loss"] for row in train], label="training", linewidth=1)
    for k in range(len(train[0]["mtp_loss"]) if train else 0):
        loss.plot(steps, [row["mtp_loss"][k] for row in train], label=f"MTP depth {k + 1}", linewidth=1, alpha=0.6)
    loss.plot(
        [row["step"] for row in held], [row["heldout_nats"] for row in held], "ko-", label="held-out", markersize=4
    )
    loss.set(title="Loss", xlabel="step", ylabel="nats a token")
    loss.legend()

    bits.plot([row["step"] for row in held], [row["heldout_bpb"] for row in held], "ko-", label="model", markersize=4)
    for name, colour in (("gzip_bpb", "tab:orange"), ("xz_bpb", "tab:green")):
        if held:
            value = held[-1][name]
            bits.axhline(value, color=colour, linestyle="--", label=f"{name.removesuffix('_bpb')} -9: {value:.3f}")
    bits.set(title="Held-out text", xlabel="step", ylabel="bits a byte", ylim=(0, None))
    bits.legend()

    layers = np.array([row["max_vio"] for row in train]) if train else np.zeros((0, 0))
    for layer in range(layers.shape[1] if train else 0):
        violation.plot(steps, layers[:, layer], label=f"MoE layer {layer}", linewidth=1)
    violation.set(title="MaxVio: highest expert load over the mean, minus 1", xlabel="step", ylim=(0, None))
    if 0 < layers.shape[-1] <= 8:
        violation.legend()

    if train:
        counts = np.array(train[-1]["load"], float)
        share = counts / np.maximum(counts.mean(axis=1, keepdims=True), 1e-9)
        image = load.imshow(share, aspect="auto", vmin=0, vmax=2, cmap="RdBu_r", interpolation="nearest")
        figure.colorbar(image, ax=load, label="load over the mean")
        load.set(
            title=f"Expert load, step {train[-1]['step']}",
            xlabel="expert",
            ylabel="MoE layer",
            yticks=range(len(share)),
        )
    figure.savefig(path, dpi=110)


def _replace(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)
