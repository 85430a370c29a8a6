"""`dsjax config NAME --plot`: learning rate, batch, MTP weight and router-bias speed over the tokens of a run."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dsjax.config import Config
from dsjax.plan.count import human
from dsjax.train.picture import BLUE, GREEN, GREY, INK, ORANGE, STYLE
from dsjax.train.schedule import Schedule

POINTS = 2000  # steps that are drawn, besides those where the plan turns
PANELS = {  # setting: (title, unit, colour)
    "learning_rate": ("Learning rate", "", BLUE),
    "batch": ("Batch", "rows a step", GREEN),
    "mtp_weight": ("MTP weight λ", "", ORANGE),
    "bias_update_speed": ("Router-bias speed γ", "", INK),
}


def draw_recipe(config: Config, path: Path) -> None:
    """The run's plan as PNG: a panel for each setting, dashed lines where it turns."""
    schedule = Schedule(config)
    tokens, values = curves(schedule)
    turns, shown = schedule.changes(), _shown(config)
    unit, name = _unit(float(tokens[-1]))
    with matplotlib.rc_context(STYLE | {"axes.titlesize": 11}):
        heights = [2.2, *[1] * (len(shown) - 1)]
        figure = Figure(figsize=(11, 2 + 1.4 * sum(heights)), layout="constrained")
        panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[
            :, 0
        ]
        title = f"{config.name}: {human(int(tokens[-1]))} tokens in {config.steps:,} steps, {_optimizer(config)}"
        figure.suptitle(title, x=0.01, ha="left", color=GREY, fontsize=10)
        for panel, setting in zip(panels, shown):
            (label, what, colour), y = PANELS[setting], values[setting]
            panel.set_title(label)
            panel.set_ylabel(what)
            # Steps at which a setting jumps are drawn as jumps: each value holds until the next step.
            panel.plot(tokens / unit, y, color=colour, lw=1.8, drawstyle="steps-post")
            panel.set_ylim(0, 1.25 * max(y.max(), 1e-12))
            panel.yaxis.set_major_formatter(FuncFormatter(lambda v, _: _value(v)))
            panel.yaxis.set_major_locator(MaxNLocator(6 if panel is panels[0] else 3))
            # The end of the run is no turn, though the last step may pass it.
            _mark(panel, sorted({t for t in turns[setting] if 0 < t < 0.999 * tokens[-1]}), tokens, y, unit)
        panels[-1].set_xlabel(f"{name} of tokens")
        panels[-1].set_xlim(0, 1.02 * tokens[-1] / unit)
        figure.savefig(path, dpi=110)


def curves(schedule: Schedule) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Tokens before each of some steps, and the settings there: evenly over the run, and on both sides of each turn."""
    config, last = schedule.config, schedule.config.steps - 1
    steps = set(np.linspace(0, last, min(POINTS, config.steps)).astype(int).tolist())
    for places in schedule.changes().values():
        at = [schedule.step_at(int(np.ceil(tokens))) for tokens in places]
        steps |= {step for here in at for step in (here - 1, here) if 0 <= step <= last}
    knobs = [schedule.at(step) for step in sorted(steps)]
    rows = config.batch_size // config.accumulate
    values = {name: np.array([getattr(k, name) for k in knobs]) for name in PANELS if name != "batch"}
    values["batch"] = np.array([rows * k.micro_batches for k in knobs])
    tokens = [schedule.tokens(k.step) for k in knobs]
    # The last step's settings hold to the end of its tokens.
    return np.array([*tokens, schedule.total_tokens]), {name: np.append(v, v[-1]) for name, v in values.items()}


def _mark(panel, turns: list[float], tokens: np.ndarray, y: np.ndarray, unit: float) -> None:
    """Dashed lines with the place, and the value from there on; those that are close take turns in height."""
    span, before, level = tokens[-1], -np.inf, 0
    for turn in turns:
        level = level + 1 if turn - before < 0.07 * span else 0
        before = turn
        value = float(y[min(np.searchsorted(tokens, turn), len(y) - 1)])
        panel.axvline(turn / unit, color=GREY, ls="--", lw=1)
        panel.annotate(
            f"{_place(turn)}: {_value(value)}",
            (turn / unit, 0.97 - 0.11 * level),
            xycoords=("data", "axes fraction"),
            xytext=(4 if turn < 0.85 * span else -4, 0),
            textcoords="offset points",
            ha="left" if turn < 0.85 * span else "right",
            va="top",
            color=INK,
            fontsize=8.5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )


def _shown(config: Config) -> list[str]:
    """The settings that this model has."""
    absent = {"mtp_weight"} if not config.model.num_nextn_predict_layers else set()
    absent |= {"bias_update_speed"} if config.model.topk_method != "noaux_tc" else set()
    return [setting for setting in PANELS if setting not in absent]


def _value(value: float) -> str:
    """2.2e-4, 0.3, 15,360."""
    if value >= 1000:
        return f"{value:,.0f}"
    mantissa, _, exponent = (
        f"{value:.3g}".partition("e") if value >= 0.01 or not value else f"{value:.2e}".partition("e")
    )
    return f"{float(mantissa):g}e{int(exponent)}" if exponent else f"{float(mantissa):g}"


def _unit(tokens: float) -> tuple[float, str]:
    units = ((1e12, "trillions"), (1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))
    return next((u for u in units if tokens >= u[0]), (1.0, "number"))


def _place(tokens: float) -> str:
    """14.633T, 33.2B."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if tokens >= size:
            return f"{tokens / size:.5g}{suffix}" if size == 1e12 else f"{tokens / size:.3g}{suffix}"
    return f"{tokens:.0f}"


def _optimizer(config: Config) -> str:
    return {"adamw": "AdamW", "muon": "Muon"}[config.optimizer.name]
