"""A plan: every number with its unit and where it comes from, as table, JSON and picture.

`basis` is one of: compiled (libtpu says so), computed (arithmetic from shapes), published (of the chip, by Google),
assumed (see `roofline`), measured (on this machine: the compile itself).
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from dsjax.config import Config, to_dict
from dsjax.plan import count, roofline
from dsjax.plan.chips import GIB, Topology
from dsjax.plan.compile import Compiled
from sharding.mesh import show_axes

# Tokens a second a chip that MaxText's authors publish for the 671B model, by chip, chips and format.
PUBLISHED = {("v5p", 512, "bf16"): 542, ("tpu7x", 256, "bf16"): 2446, ("tpu7x", 256, "fp8"): 2968}
PUBLISHED_MODEL = 671_026_419_200  # parameters
CATEGORIES = ("parameters", "optimizer", "gradients", "activations", "temporary")


@dataclasses.dataclass(frozen=True)
class Row:
    """One number of a plan."""

    section: str
    name: str
    value: float
    unit: str
    basis: str
    note: str = ""


def rows(
    config: Config,
    topology: Topology,
    compiled: Compiled | None,
    *,
    slices: int = 1,
    tokens: float = 14.8e12,
    price: float | None = None,
) -> list[Row]:
    """All numbers of a plan, in the order in which they are shown; memory, traffic and speed are of one chip."""
    chip, sizes = topology.chip, vars(config.mesh)
    per_chip, chips = chip.devices, topology.chips * slices
    estimate = roofline.estimate(config, sizes)
    if compiled is not None:
        estimate = dataclasses.replace(estimate, sent=sent_by_axis(compiled))
    times = roofline.times(estimate, topology, sizes, slices)
    step_tokens = config.batch_size * config.seq_len
    speed = step_tokens / times.predicted / chips
    model_flops = estimate.model_flops * per_chip
    found = [*_memory(topology, compiled, estimate), *_network(topology, compiled, estimate, times)]
    by_compiler = compiled is not None
    found += [
        Row("work", "model FLOPs a step", model_flops, "FLOP", "computed", "6 a parameter, causal attention, MTP"),
        Row(
            "work", "with recomputation", estimate.flops * per_chip, "FLOP", "computed", f"remat={config.compute.remat}"
        ),
    ]
    if by_compiler:
        found += [
            Row("work", "matrix products in the program", compiled.flops * per_chip, "FLOP", "compiled",
                "loops unrolled; experts at all rows of their buffers, attention kernels left out"),
            Row("work", "the compiler's optimal time", compiled.optimal_s, "s", "compiled", "loop bodies once"),
            Row("work", "the compiler's cycles", compiled.cycles / chip.clock_hz, "s", "compiled",
                "at an assumed clock; loops unrolled; without kernels and waits for the network"),
        ]  # fmt: skip
    found += [
        Row("time", "at peak FLOPs", times.compute, "s", "computed", f"{chip.bf16_flops / 1e12:.0f} TFLOP/s published"),
        Row("time", "at peak HBM bandwidth", times.hbm, "s", "computed",
            f"{chip.hbm_bandwidth / 1e9:.0f} GB/s published, traffic estimated"),
        Row("time", "at peak network", sum(times.network.values()), "s", "computed",
            f"{chip.ici_link / 1e9:.0f} GB/s a link each way published, layout of the mesh assumed"),
        Row("time", "roofline", times.roofline, "s", "computed", f"bound by {times.bound}; no step is faster"),
        Row("time", "predicted step", times.predicted, "s", "assumed",
            f"{roofline.COMPUTE_REACHED:.0%} of peak FLOPs, {roofline.HBM_REACHED:.0%} of bandwidths, "
            f"{roofline.NETWORK_EXPOSED:.0%} of the network's time in the open"),
        Row("speed", "tokens a step", step_tokens, "tokens", "computed"),
        Row("speed", "tokens/s/chip", speed, "tokens/s", "assumed", "by the predicted step"),
        Row("speed", "MFU", model_flops / times.predicted / chip.bf16_flops, "", "assumed",
            "model FLOPs of the bf16 peak"),
        Row("run", f"days for {count.human(int(tokens))} tokens", tokens / speed / chips / 86400, "days", "assumed"),
        Row("run", "chip-hours", tokens / speed / 3600, "h", "assumed"),
    ]  # fmt: skip
    if count.parameters(config.model).total == PUBLISHED_MODEL:
        at = next(i for i, row in enumerate(found) if row.name == "MFU")
        found[at:at] = [
            Row("speed", f"MaxText, {n} chips, {width}", value, "tokens/s", "published", "calibration: its own recipe")
            for (name, n, width), value in PUBLISHED.items()
            if name == chip.name
        ]
    if price is not None:
        found.append(
            Row("run", "cost", tokens / speed / 3600 * price, "$", "assumed", f"at ${price:g} a chip-hour, given")
        )
    if by_compiler:
        found += [
            Row("compile", "CPU time", compiled.cpu_s, "s", "measured"),
            Row("compile", "memory", compiled.peak_rss, "B", "measured"),
        ]
    return found


def sent_by_axis(compiled: Compiled) -> dict[str, float]:
    """Bytes that a device sends a step, by the mesh axes crossed."""
    total: dict[str, float] = {}
    for c in compiled.collectives:
        name = "+".join(c["axes"])
        total[name] = total.get(name, 0) + c["bytes"]
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def _memory(topology: Topology, compiled: Compiled | None, estimate: roofline.Estimate) -> list[Row]:
    n = topology.chip.devices
    if compiled is None:
        parts = {name: (value, "computed", "estimate") for name, value in estimate.memory.items()}
        total = estimate.hbm
    else:
        total = compiled.hbm
        known = {name: getattr(compiled, name) for name in CATEGORIES[:-1]}
        parts = {name: (value, "computed", "shapes on a device") for name, value in known.items()}
        parts["temporary"] = total - sum(known.values()), "compiled", "the rest of the compiler's total"
    found = [Row("HBM a chip", name, value * n, "B", basis, note) for name, (value, basis, note) in parts.items()]
    basis = "computed" if compiled is None else "compiled"
    part = total * n / topology.chip.hbm_bytes
    found.append(Row("HBM a chip", "all", total * n, "B", basis, f"{part:.0%} of the chip's; "
                     + ("fits" if part <= 1 else "does not fit")))  # fmt: skip
    found.append(Row("HBM a chip", "the chip's", topology.chip.hbm_bytes, "B", "published", topology.chip.source))
    return found


def _network(topology, compiled, estimate, times) -> list[Row]:
    basis = "computed" if compiled is None else "compiled"
    return [
        Row(
            "sent a chip a step", axes, sent * topology.chip.devices, "B", basis, f"{times.network[axes]:.3f} s at peak"
        )
        for axes, sent in estimate.sent.items()
    ]


def as_json(config: Config, topology: Topology, slices: int, found: list[Row], extra: dict[str, Any]) -> dict[str, Any]:
    """A plan ready for JSON."""
    return {
        "preset": config.name,
        "topology": topology.name,
        "slices": slices,
        "chips": topology.chips * slices,
        "devices": topology.devices * slices,
        "mesh": vars(config.mesh),
        "numbers": [dataclasses.asdict(row) for row in found],
        "config": to_dict(config),
        **extra,
    }


def save(folder: Path, plan: dict[str, Any]) -> None:
    """plan.json and plan.png in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(plan, indent=2) + "\n")
    draw(plan, folder / "plan.png")


def shown(row: Row) -> tuple[str, str]:
    """A row's value and unit as one reads them."""
    if row.unit == "B":
        return (f"{row.value / GIB:.2f}", "GiB") if row.value >= 0.05 * GIB else (f"{row.value / 2**20:.2f}", "MiB")
    if row.unit == "FLOP":
        return f"{row.value / 1e12:,.2f}", "TFLOP"
    if row.unit == "s":
        return (f"{row.value:.3f}" if row.value < 100 else f"{row.value:.0f}"), "s"
    if row.unit == "$":
        return f"{row.value:,.0f}", "$"
    if not row.unit:
        return f"{row.value:.1%}", ""
    return f"{row.value:,.0f}" if row.value >= 100 else f"{row.value:.2f}", row.unit


def table(found: list[Row]) -> list[tuple[str, str, str, str, str]]:
    """(what, value, unit, basis, note) of every row; a section's name stands in a line of its own."""
    lines, section = [], ""
    for row in found:
        if row.section != section:
            section = row.section
            lines.append((section, "", "", "", ""))
        lines.append((f"  {row.name}", *shown(row), row.basis, row.note))
    return lines


def draw(plan: dict[str, Any], path: Path) -> None:
    """Three panels: HBM by category against the chip's, bytes by mesh axis, and the times of a step."""
    import matplotlib
    from matplotlib.figure import Figure

    from dsjax.train.picture import BLUE, GREEN, GREY, ORANGE, STYLE

    def of(section: str) -> dict[str, float]:
        return {row["name"]: row["value"] for row in plan["numbers"] if row["section"] == section}

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 4.6), layout="constrained")
        memory, network, time = figure.subplots(1, 3)
        mesh = show_axes(plan["mesh"])
        figure.suptitle(
            f"{plan['preset']} on {plan['slices']} x {plan['topology']} ({plan['chips']} chips), {mesh}",
            x=0.01, ha="left", color=GREY, fontsize=10,
        )  # fmt: skip
        held = of("HBM a chip")
        shades = dict(zip(CATEGORIES, (BLUE, "#7aa5f0", GREEN, ORANGE, GREY)))
        bottom = 0.0
        for name in CATEGORIES:
            value = max(held[name], 0) / GIB
            memory.bar(0, value, bottom=bottom, color=shades[name], width=0.6, label=f"{name}  {value:.1f}")
            bottom += value
        memory.axhline(held["the chip's"] / GIB, color=ORANGE, ls="--", lw=1.2, label="the chip's HBM")
        memory.set(title="HBM a chip", ylabel="GiB", xlim=(-0.5, 1.8), xticks=[])
        memory.set_ylim(0, 1.2 * max(bottom, held["the chip's"] / GIB))
        memory.legend(loc="center right")
        memory.set_axisbelow(True)
        _bars(network, "Sent a chip a step", "GiB", {k: v / GIB for k, v in of("sent a chip a step").items()}, BLUE)
        _bars(time, "Time of a step", "s", of("time"), GREEN)
        figure.savefig(path, dpi=110)


def _bars(panel, title: str, unit: str, values: dict[str, float], color: str) -> None:
    names = list(values)[:8][::-1]
    panel.barh(names, [values[name] for name in names], color=color, height=0.6)
    panel.set(title=title, xlabel=unit, ylim=(-0.7, max(len(names), 3) - 0.3))
    panel.set_axisbelow(True)
    if not names:
        panel.text(0.5, 0.5, "nothing", ha="center", transform=panel.transAxes)
