"""loss.png: loss, held-out bits a byte beside gzip and xz, MaxVio, and the load of every expert; of policy optimisation
reward, pass@k, length, and how far policies are from each other."""

from pathlib import Path
from typing import Any, BinaryIO

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, GREY, BLUE, ORANGE, GREEN = "#1a1a1a", "#8c8c8c", "#2f6fde", "#e07b29", "#2a9d6f"
VIOLET = "#8a5fd0"
STYLE = {
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "font.size": 10,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
}


def draw(rows: list[dict[str, Any]], to: Path | BinaryIO) -> None:
    """Four panels of the rows of a metrics.jsonl, as PNG."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 8.5), layout="constrained")
        panels = figure.subplots(2, 2)
        run = next((row for row in rows if row["kind"] == "run"), {})
        train = [row for row in rows if row["kind"] == "train"]
        held = [row for row in rows if row["kind"] == "eval"]
        figure.suptitle(run.get("title", ""), x=0.01, ha="left", color=GREY, fontsize=10)
        if any("reward" in row for row in train) or any("heldout_reward" in row for row in held):
            _of_policy(panels, train, held)
        else:
            _of_language(figure, panels, train, held, run)
        figure.savefig(to, dpi=110)


def _of_language(figure, panels, train, held, run) -> None:
    (loss, bits), (violation, load) = panels
    _loss(loss, train, held)
    _bits(bits, held)
    _violation(violation, train, run)
    _load(figure, load, train, run)


def _of_policy(panels, train, held) -> None:
    (reward, passed), (length, apart) = panels
    steps, last = [row["step"] for row in train], train[-1] if train else {}
    parts = [name for name in last if name.startswith("reward_")]
    reward.set(title="Reward", xlabel="step", ylabel="of an answer")
    for name, colour in zip(parts if len(parts) > 1 else [], (ORANGE, GREEN, VIOLET, GREY)):
        _line(reward, train, name, colour, name.removeprefix("reward_"))
    _line(reward, train, "reward", BLUE, "mean reward", lw=1.8)
    _line(reward, held, "heldout_reward", INK, "held out", "o-")
    passed.set(title="Held-out problems", xlabel="step", ylabel="share solved", ylim=(0, 1.02))
    names = [name for name in (held[-1] if held else {}) if name.startswith("pass_")]
    for name, colour in zip(names, (INK, BLUE, GREEN, ORANGE, VIOLET, GREY)):
        _line(passed, held, name, colour, f"pass@{name[5:]}", "o-")
    length.set(title="Length of answers", xlabel="step", ylabel="tokens")
    _line(length, train, "length_max", ORANGE, "longest")
    _line(length, train, "length", BLUE, "mean", lw=1.8)
    _line(length, held, "heldout_length", INK, "held out", "o-")
    apart.set(title="Entropy, and how far policies are apart", xlabel="step", ylabel="nats a token", yscale="log")
    _line(apart, train, "entropy", GREEN, "entropy")
    _line(apart, train, "kl", BLUE, "KL to the reference")
    _line(apart, train, "gap", ORANGE, "sampler to trainer")
    _line(apart, train, "gap_max", ORANGE, "sampler to trainer, most", lw=0.8)
    for panel, why in zip(panels.flat, ("no steps yet", "nothing measured yet", "no steps yet", "no steps yet")):
        if not panel.lines:
            _nothing(panel, why)
            continue
        panel.legend()
        _from_zero(panel, [*steps, *(row["step"] for row in held)])
        if panel in (reward, length):
            low, high = (f(f(line.get_ydata()) for line in panel.lines) for f in (min, max))
            panel.set_ylim(min(0, 1.08 * low), 1.08 * high if high > 0 else 1)


def _line(panel, rows, name: str, colour: str, label: str, mark: str | None = None, lw: float = 1.3) -> None:
    """Through the rows that have it; on an axis of powers, where it is above 0."""
    values = _numbers([row.get(name) for row in rows])
    known = np.isfinite(values) & ((values > 0) | (panel.get_yscale() != "log"))
    if known.any():
        steps = [row["step"] for row, here in zip(rows, known) if here]
        panel.plot(steps, values[known], mark or _mark(steps), color=colour, lw=lw, ms=4, label=label)


def _loss(panel, train, held) -> None:
    panel.set(title="Loss", xlabel="step", ylabel="nats a token")
    if not train and not held:
        return _nothing(panel, "no steps yet")
    steps = [row["step"] for row in train]
    depth = len(train[0]["mtp_loss"]) if train else 0
    for k in range(depth):
        values = _numbers([row["mtp_loss"][k] for row in train])
        panel.plot(steps, values, _mark(steps), color=ORANGE, alpha=0.8 / (k + 1), lw=1.2, label=f"MTP depth {k + 1}")
    panel.plot(steps, _numbers([row["loss"] for row in train]), _mark(steps), color=BLUE, lw=1.4, label="training")
    _heldout_line(panel, held, "heldout_nats", "ema_heldout_nats")
    panel.legend()
    _from_zero(panel, [row["step"] for row in [*train, *held]])


def _bits(panel, held) -> None:
    panel.set(title="Held-out text", xlabel="step", ylabel="bits a byte")
    if not held:
        return _nothing(panel, "no evaluation yet")
    if "heldout_bpb" not in held[-1]:
        return _perplexity(panel, held)
    _heldout_line(panel, held, "heldout_bpb", "ema_heldout_bpb")
    for name, colour, below in (("gzip_bpb", ORANGE, False), ("xz_bpb", GREEN, True)):
        value = held[-1][name]
        panel.axhline(value, color=colour, ls="--", lw=1.2)
        panel.annotate(
            f"{name.removesuffix('_bpb')} -9: {value:.3f}",
            (1, value),
            xycoords=("axes fraction", "data"),
            xytext=(-2, -3 if below else 3),
            textcoords="offset points",
            ha="right",
            va="top" if below else "bottom",
            color=colour,
        )
    last = held[-1]
    if last["heldout_bpb"] is not None:
        panel.annotate(
            f"{last['heldout_bpb']:.3f}",
            (last["step"], last["heldout_bpb"]),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            color=INK,
        )
    highest = np.nanmax(_numbers([*(row["heldout_bpb"] for row in held), last["gzip_bpb"], last["xz_bpb"]]))
    panel.set_ylim(0, 1.15 * highest)
    panel.legend(loc="lower left")
    _from_zero(panel, [row["step"] for row in held])


def _perplexity(panel, held) -> None:
    """What is measured of conversations, of which a part of the tokens counts."""
    panel.set(title="Held-out conversations", ylabel="perplexity of a learned token")
    steps, values = [row["step"] for row in held], np.exp(_numbers([row["heldout_nats"] for row in held]))
    panel.plot(steps, values, "o-", color=INK, ms=5, lw=1.4, label="held out")
    panel.legend()
    _from_zero(panel, steps)


def _violation(panel, train, run) -> None:
    panel.set(title="MaxVio: busiest expert over the mean, minus 1", xlabel="step")
    values = np.array([_numbers(row["max_vio"]) for row in train])
    if not values.size:
        return _nothing(panel, "no expert layers" if train else "no steps yet")
    steps, n = [row["step"] for row in train], values.shape[1]
    names, colours = _layers(run, n), matplotlib.colormaps["viridis"](np.linspace(0, 0.9, n))
    if n <= 8:
        for k in range(n):
            panel.plot(steps, values[:, k], _mark(steps), color=colours[k], lw=1.2, label=names[k])
    else:
        low, high = values.min(axis=1), values.max(axis=1)
        panel.fill_between(steps, low, high, color=BLUE, alpha=0.25, lw=1, label=f"all {n} layers, lowest to highest")
        panel.plot(steps, values.mean(axis=1), _mark(steps), color=BLUE, lw=1.6, label="mean of the layers")
    panel.legend(ncols=1 + n // 5 if n <= 8 else 1)
    highest = np.nanmax(values, initial=0)
    panel.set_ylim(0, 1.15 * highest if highest > 0 else 1)
    _from_zero(panel, steps)


def _load(figure, panel, train, run) -> None:
    panel.set(title="Expert load", xlabel="expert")
    panel.grid(False)
    counts = np.array(train[-1]["load"], float) if train else np.zeros(0)
    if not counts.size:
        return _nothing(panel, "no expert layers" if train else "no steps yet")
    share = counts / np.maximum(counts.mean(axis=1, keepdims=True), 1e-9)
    image = panel.imshow(share, aspect="auto", vmin=0, vmax=2, cmap="RdBu_r", interpolation="nearest")
    figure.colorbar(image, ax=panel, label="load over the mean", extend="max")
    names = _layers(run, len(share))
    every = -(-len(names) // 16)
    panel.set_yticks(range(0, len(names), every), names[::every])
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_title(f"Expert load over the mean, to step {train[-1]['step']}")


def _heldout_line(panel, held, name: str, averaged: str) -> None:
    if not held:
        return
    steps = [row["step"] for row in held]
    if averaged in held[-1]:
        values = _numbers([row.get(averaged) for row in held])
        panel.plot(steps, values, "s:", color=GREY, ms=4, lw=1.2, label="held out, averaged weights")
    panel.plot(steps, _numbers([row[name] for row in held]), "o-", color=INK, ms=5, lw=1.4, label="held out")


def _layers(run: dict[str, Any], n: int) -> list[str]:
    names = run.get("layers", [])
    return names if len(names) == n else [f"expert layer {k}" for k in range(n)]


def _numbers(values: list) -> np.ndarray:
    """Values with NaN, which a plot leaves out, for null."""
    return np.array([np.nan if v is None else v for v in values], float)


def _mark(steps: list[int]) -> str:
    return "-" if len(steps) > 1 else "o"


def _from_zero(panel, steps: list[int]) -> None:
    panel.set_xlim(0, 1.04 * max(1, *steps))
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))


def _nothing(panel, why: str) -> None:
    panel.text(0.5, 0.5, why, transform=panel.transAxes, ha="center", va="center", color=GREY)
    panel.set(xticks=[], yticks=[])
