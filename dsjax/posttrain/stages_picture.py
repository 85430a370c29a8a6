"""stages.png: what each stage of a pipeline did to right answers, their form and language, and their length."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from dsjax.data.sources import parse_source
from dsjax.files import replacing
from dsjax.train.picture import BLUE, GREEN, GREY, INK, ORANGE, STYLE

_COLOURS = (BLUE, ORANGE, GREEN, GREY, INK)
_APART = 0.06  # of points of several measures at one stage


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Three panels, a stage with a model a place, as PNG. Lines join what led to the last stage; others stand alone,
    hollow. Nothing where nothing was measured."""
    measured = {stage: of for stage, of in result["measured"].items() if of}
    if not measured:
        return
    stages, names = list(measured), list(dict.fromkeys(name for of in measured.values() for name in of))
    way = leading(result)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(14, 4.8), layout="constrained")
        right, form, length = figure.subplots(1, 3)
        for n, name in enumerate(names):
            colour, shift = _COLOURS[n % len(_COLOURS)], (n - (len(names) - 1) / 2) * _APART
            mine = {i: measured[stage][name] for i, stage in enumerate(stages) if name in measured[stage]}

            def points(panel, key, style, label, scale=1, mine=mine, colour=colour, shift=shift):
                found = {i: scale * of[key] for i, of in mine.items() if of[key] is not None}
                joined = {i: value for i, value in found.items() if stages[i] in way}
                beside = {i: value for i, value in found.items() if stages[i] not in way}
                if joined:
                    panel.plot([i + shift for i in joined], list(joined.values()), style, color=colour, lw=1.6, ms=5,
                               label=label)  # fmt: skip
                if beside:
                    panel.plot(
                        [i + shift for i in beside], list(beside.values()), style[0], color=colour, mfc="w", ms=6
                    )

            points(right, "pass@1", "o-", name, 100)
            at, of = [i + shift for i in mine], list(mine.values())
            spread = {"fmt": "none", "color": colour, "capsize": 3}
            right.errorbar(at, [100 * one["pass@1"] for one in of], [100 * one["error"] for one in of], **spread)
            points(form, "format", "s:", f"{name}: form", 100)
            points(form, "language", "o-", f"{name}: language", 100)
            points(length, "tokens", "o-", name)
        right.set(title="Right answers, pass@1", ylabel="percent of held-out problems", ylim=(-3, 103))
        form.set(title="Form, and words of the language", ylabel="percent", ylim=(-3, 103))
        length.set(title="Length", ylabel="tokens an answer")
        length.set_ylim(bottom=0)
        for panel in (right, form, length):
            panel.set_xticks(range(len(stages)), stages, rotation=25, ha="right")
            if panel.get_legend_handles_labels()[0]:
                panel.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.26), ncols=3)  # hides no point
        with replacing(path) as file:
            figure.savefig(file, dpi=110)


def leading(result: Mapping[str, Any]) -> set[str]:
    """The stages that the last one came of, itself and the base included."""
    given = {entry["given"]["name"]: entry["given"] for entry in result["stages"]}
    way, todo = {"base"}, list(given)[-1:]
    while todo:
        name = todo.pop()
        way.add(name)
        sources = [given[name]["from"], *(parse_source(entry)[0] for entry in given[name].get("data", ()))]
        todo += [source for source in sources if source in given and source not in way]
    return way
