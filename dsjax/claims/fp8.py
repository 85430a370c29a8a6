"""The claim that training in FP8 loses nothing: a model in bf16 and in FP8, from the same seeds on the same text.

arXiv:2412.19437, appendix B.1: a relative loss difference below 0.25%.

Every training is a run folder of its own, so that a claim that was stopped goes on where it was.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dsjax.claims.runs import only_of, pretrained
from dsjax.config import Config, override, replace
from dsjax.files import replacing, write_json
from dsjax.train import loop
from dsjax.train.lines import read_lines

BOUND = 0.0025  # of the relative difference, arXiv:2412.19437, section 3.3
LAST = 0.1  # part of the steps that is compared
BASE, CLAIMED = "bf16", "fp8_deepseek"
# What shows how much the difference says: another rounding of bf16's own numbers, one scale a matrix, and gradients in
# 128x128 blocks, with which the paper's 16B model diverged after 300B tokens (appendix B.2).
CONTROLS = ("float32", "fp8_tensor", "fp8_block_gradients")


def small_model(tiny: Config) -> Config:
    """What is trained where nothing else is asked for: `tiny`, with rows of two tiles, at an eighth of its rate.

    At that rate bf16 and float32 end within 0.01% of each other; at half of the preset's they are 0.5% apart, as what
    is rounded differently decides which way a training goes, and no difference of 0.25% means anything.
    """
    return override(
        tiny,
        {
            "steps": 200,
            "seq_len": 128,
            "optimizer.peak_lr": 5e-4,
            "model.hidden_size": 256,
            "model.moe_intermediate_size": 128,
        },
    )


def test(config: Config, folder: Path, n_seeds: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Trains what is not trained yet, n_seeds times each recipe; writes claim.json and claim.png into the folder.

    Raises ConfigError if a training was stopped, or is one of another configuration.
    """
    only_of(folder, config)
    losses = {}
    for recipe in (BASE, CLAIMED, *CONTROLS):
        for seed in range(n_seeds):
            once = replace(
                config,
                seed=config.seed + seed,
                log_every=1,
                eval_every=config.steps,
                compute=replace(config.compute, precision=recipe),
            )
            losses[recipe, seed] = _trained(once, folder / f"{recipe}-{seed}", say)
    result = compare(losses, n_seeds)
    folder.mkdir(parents=True, exist_ok=True)
    whole = {**result, "preset": config.name, "steps": config.steps, "machine": loop.machine()}
    whole["tokens"] = config.steps * config.batch_size * config.seq_len
    write_json(folder / "claim.json", whole)
    draw(losses, n_seeds, folder / "claim.png")
    return whole


def compare(losses: dict[tuple[str, int], np.ndarray], n_seeds: int) -> dict[str, Any]:
    """Of each recipe the relative difference to bf16 of the mean loss over the last steps: of every seed, and the mean.

    losses: [steps] nats a token, by recipe and seed. The claim holds if the mean of the seeds is within the bound.
    """
    n = _compared(len(losses[BASE, 0]))
    ends = {key: float(np.mean(values[-n:])) for key, values in losses.items()}
    rows = {}
    for recipe in dict.fromkeys(recipe for recipe, _ in losses):
        differences = [ends[recipe, seed] / ends[BASE, seed] - 1 for seed in range(n_seeds)]
        rows[recipe] = {
            "loss": [ends[recipe, seed] for seed in range(n_seeds)],
            "difference": differences,
            "mean_difference": float(np.mean(differences)),
        }
    holds = bool(abs(rows[CLAIMED]["mean_difference"]) <= BOUND)  # False for NaN: a training that went wrong
    return {"claim": f"{CLAIMED} within {BOUND:.2%} of {BASE}", "holds": holds, "bound": BOUND, "recipes": rows}


def table(result: dict[str, Any]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Head and rows, differences in percent."""
    seeds = len(next(iter(result["recipes"].values()))["loss"])
    head = ["recipe", "loss", *(f"seed {seed}" for seed in range(seeds)), "mean"]
    rows = [
        (
            name,
            f"{np.mean(row['loss']):.4f}",
            *(f"{100 * d:+.3f}%" for d in row["difference"]),
            f"{100 * row['mean_difference']:+.3f}%",
        )
        for name, row in result["recipes"].items()
    ]
    return head, rows


def _trained(config: Config, run: Path, say) -> np.ndarray:
    """Losses of every step of a run, which is trained if it is not."""
    pretrained(config, run, None, say)
    losses = _losses(run)
    return np.array([losses[step] for step in sorted(losses)], float)  # NaN for null


def _losses(run: Path) -> dict[int, float | None]:
    """By step, as far as the run has come."""
    return {row["step"]: row["loss"] for row in read_lines(run / "metrics.jsonl") if row["kind"] == "train"}


def _compared(n_steps: int) -> int:
    """How many of the steps a mean is of."""
    return max(1, round(LAST * n_steps))


def draw(losses: dict[tuple[str, int], np.ndarray], n_seeds: int, path: Path) -> None:
    """Losses, and the relative difference to bf16, both as means of the last tenth of the steps before each, as PNG."""
    import matplotlib
    from matplotlib.figure import Figure

    from dsjax.train.picture import BLUE, GREEN, GREY, INK, ORANGE, STYLE

    colours = dict(zip((BASE, CLAIMED, *CONTROLS), (INK, BLUE, GREY, ORANGE, GREEN)))
    n = _compared(len(losses[BASE, 0]))
    smooth = {key: np.convolve(values, np.ones(n) / n, mode="valid") for key, values in losses.items()}
    steps = np.arange(n, len(losses[BASE, 0]) + 1)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 4.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        for recipe, colour in colours.items():
            ours = np.array([smooth[recipe, seed] for seed in range(n_seeds)])
            base = np.array([smooth[BASE, seed] for seed in range(n_seeds)])
            left.plot(steps, ours.mean(axis=0), color=colour, lw=1.4, label=recipe)
            if recipe != BASE:
                difference = 100 * (ours / base - 1)
                right.fill_between(steps, difference.min(axis=0), difference.max(axis=0), color=colour, alpha=0.12)
                right.plot(steps, difference.mean(axis=0), color=colour, lw=1.6, label=recipe)
        right.axhspan(-100 * BOUND, 100 * BOUND, color=GREY, alpha=0.15, lw=0)
        right.axhline(0, color=INK, lw=1)
        left.set(title="Loss, mean of the seeds", xlabel="step", ylabel="nats a token")
        right.set(
            title=f"Relative difference to {BASE}; grey: the bound of {BOUND:.2%}",
            xlabel="step",
            ylabel="percent; mean, lowest and highest of the seeds",
        )
        for panel in (left, right):
            panel.set_xlim(0, 1.02 * steps[-1])
            panel.legend()
        with replacing(path) as file:
            figure.savefig(file, dpi=110)
