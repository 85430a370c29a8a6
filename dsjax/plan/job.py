"""`dsjax plan`: a configuration on a slice, by the compiler where libtpu is installed, by arithmetic where not."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsjax.config import Config, ConfigError, MeshConfig, override, replace
from dsjax.plan import launch, report
from dsjax.plan.chips import GIB, Topology
from dsjax.plan.compile import Compiled, CompileError, available, compile_step
from dsjax.plan.roofline import estimate, times
from dsjax.plan.search import search
from dsjax.train.layout import check_mesh
from sharding.mesh import MeshError, fill_sizes, show_axes

INSTALL = "libtpu is not installed: numbers are by arithmetic alone; `pip install 'dsjax[plan]'` compiles for TPUs"


def planned(config: Config, changes: dict[str, str], batch: int | None, seq: int | None) -> Config:
    """The configuration of one step at full batch: no ramp, and one micro-batch unless `accumulate` is given."""
    config = replace(config, batch_size_start=None, batch_ramp_tokens=0)
    ours: dict[str, Any] = {}
    if batch is not None:
        ours |= {"batch_size": batch} | ({} if "accumulate" in changes else {"accumulate": 1})
    if seq is not None:
        ours["seq_len"] = seq
    return override(config, ours | changes)


def on_slice(config: Config, topology: Topology, slices: int = 1) -> Config:
    """The configuration with its mesh filled. Raises ConfigError with the arithmetic if the mesh cannot be."""
    try:
        filled = fill_sizes(topology.devices * slices, **vars(config.mesh))
    except MeshError as error:
        raise ConfigError(f"{error} ({topology.name} has {topology.devices} a slice)") from None
    sizes = dict(zip(vars(config.mesh), filled))
    check_mesh(config, sizes)
    if sizes["data"] % slices:
        raise ConfigError(f"--slices={slices}: mesh.data={sizes['data']} is no multiple; slices are joined by replicas")
    return replace(config, mesh=MeshConfig(**sizes))


def plan(
    config: Config,
    topology: Topology,
    *,
    slices: int = 1,
    tokens: float,
    price: float | None,
    compiling: bool = True,
    compiled: Compiled | None = None,
    keep_hlo: str = "",
    say: Callable[[str], None] = lambda _: None,
) -> tuple[list[report.Row], dict[str, Any]]:
    """Rows of a plan on the configuration's mesh, and the same for JSON. Raises ConfigError, one line.

    `compiled` is what the compiler said already, if it did.
    """
    config = on_slice(config, topology, slices)
    if compiled is not None:
        pass
    elif compiling and slices > 1:
        say("several slices: numbers are by arithmetic alone")
    elif compiling and available():
        say(f"compiling the step for {topology.name}: minutes")
        compiled = compile_step(config, topology, keep_hlo=keep_hlo)
    elif compiling:
        say(INSTALL)
    found = report.rows(config, topology, compiled, slices=slices, tokens=tokens, price=price)
    extra = {"compiled": dataclasses.asdict(compiled) if compiled else None}
    return found, report.as_json(config, topology, slices, found, extra)


def best(
    config: Config,
    topology: Topology,
    n_compiled: int,
    slices: int = 1,
    compiling: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[list[tuple[str, ...]], Config, Compiled | None]:
    """The search's table (mesh, HBM, step by arithmetic, then by the compiler), and the best: what it is, and what the
    compiler said of it.
    """
    candidates = search(config, topology, slices)
    if compiling and not available():
        say(INSTALL)
    compiling = compiling and available() and slices == 1
    n, lines, results = topology.chip.devices, [], []
    for i, candidate in enumerate(candidates[: max(n_compiled, 10)]):
        mine = replace(config, mesh=candidate.mesh)
        mesh = show_axes(candidate.sizes)
        line = (mesh, f"{candidate.hbm * n / GIB:.1f}", f"{candidate.step_s:.3f}")
        if compiling and i < n_compiled:
            say(f"compiling {mesh} for {topology.name}")
            try:
                compiled = compile_step(mine, topology)
            except CompileError as error:
                lines.append((*line, f"{error.needs * n / GIB:.1f}" if error.needs else "-", str(error)))
                continue
            step = predicted(mine, topology, compiled)
            results.append((step, i, mine, compiled))
            lines.append((*line, f"{compiled.hbm * n / GIB:.1f}", f"{step:.3f}"))
        else:
            results.append((float("inf"), i, mine, None))
            lines.append((*line, "", ""))
    if not results:
        raise ConfigError(f"--search: none of the {n_compiled} meshes compiled; {lines[0][-1]}")
    return lines, *min(results, key=lambda result: result[:2])[2:]


def predicted(config: Config, topology: Topology, compiled: Compiled) -> float:
    """Seconds of a step with the traffic of the compiled program."""
    sizes = vars(config.mesh)
    known = dataclasses.replace(estimate(config, sizes), sent=report.sent_by_axis(compiled))
    return times(known, topology, sizes).predicted


def save(folder: Path, plan_: dict[str, Any], config: Config, topology: Topology, slices: int, command: list[str]):
    """plan.json, plan.png and the launch files; returns the paths of the latter."""
    report.save(folder, plan_)
    return launch.write(folder, f"dsjax-{config.name}", command, topology, slices)


def training_command(source: str, config: Config, changes: dict[str, str]) -> list[str]:
    """`dsjax train` of what was planned: the same preset, changes and mesh."""
    fields = {name: value for name, value in changes.items() if not name.startswith("mesh.")}
    fields |= {"batch_size": str(config.batch_size), "seq_len": str(config.seq_len)}
    fields |= {"accumulate": str(config.accumulate), "batch_size_start": "none"}
    fields |= {f"mesh.{axis}": str(size) for axis, size in vars(config.mesh).items() if size > 1 or axis == "fsdp"}
    return ["dsjax", "train", source, *(f"--{name.replace('_', '-')}={value}" for name, value in fields.items())]
