"""stages.png: what each stage of a pipeline did to right answers, their form and language, and their length."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from dsjax.files import replacing
from dsjax.train.picture import BLUE, GREEN, GREY, INK, ORANGE, STYLE

_COLOURS = (BLUE, ORANGE, GREEN, GREY, INK)


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Three panels, a stage with a model a place, as PNG. Nothing where nothing was measured."""
    measured = {stage: of for stage, of in result["measured"].items() if of}
    if not measured:
        return
    stages, names = list(measured), list(dict.fromkeys(name for of in measured.values() for name in of))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(14, 4.8), layout="constrained")
        right, form, length = figure.subplots(1, 3)
        for colour, name in zip(_COLOURS, names):
            at = [i for i, stage in enumerate(stages) if name in measured[stage]]
            of = [measured[stages[i]][name] for i in at]
            right.errorbar(at, [100 * one["pass@1"] for one in of], [100 * one["error"] for one in of], fmt="o-",
                           color=colour, lw=1.6, ms=5, capsize=3, label=name)  # fmt: skip
            form.plot(at, [100 * one["format"] for one in of], "s:", color=colour, lw=1.2, ms=4, label=f"{name}: form")
            spoken = [(i, 100 * one["language"]) for i, one in zip(at, of) if one["language"] is not None]
            if spoken:
                form.plot(*zip(*spoken), "o-", color=colour, lw=1.6, ms=5, label=f"{name}: language")
            length.plot(at, [one["tokens"] for one in of], "o-", color=colour, lw=1.6, ms=5, label=name)
        right.set(title="Right answers, pass@1", ylabel="percent of held-out problems", ylim=(-3, 103))
        form.set(title="Form, and words of the language", ylabel="percent", ylim=(-3, 103))
        length.set(title="Length", ylabel="tokens an answer")
        length.set_ylim(bottom=0)
        for panel in (right, form, length):
            panel.set_xticks(range(len(stages)), stages, rotation=25, ha="right")
            panel.legend(fontsize=9)
        with replacing(path) as file:
            figure.savefig(file, dpi=110)
