"""`dsjax plan`."""

import json
from pathlib import Path

import click

from dsjax.cli.find import find_config
from dsjax.cli.output import note, print_table
from dsjax.cli.verb import NATURAL, POSITIVE, PRICE, TOKENS, Verb


@click.command(
    cls=Verb,
    fields=True,
    short_help="What a pod job needs, without the pod.",
    options_metavar="--topology=CHIP:SHAPE [OPTION]... [--FIELD=VALUE]...",
    epilog="""\b
Examples:
  dsjax plan v2_lite --topology=v5p:2x2x2 --batch=32
  dsjax plan v3 --topology=v5p:8x8x8 --mesh.fsdp=64 --mesh.expert=8 --batch=2048 --seq=4096 --out=plans/v3
  dsjax plan v3 --topology=tpu7x:4x8x8 --batch=2048 --search --price-per-chip-hour=12""",
)
@click.argument("preset")
@click.option("--topology", metavar="CHIP:SHAPE", required=True, help="v5e, v5p, v6e or tpu7x and chips: v5p:8x8x8.")
@click.option(
    "--slices", type=POSITIVE, default=1, show_default=True, help="Slices, joined by the data centre's network."
)
@click.option("--batch", type=POSITIVE, metavar="ROWS", help="Rows a step, all chips together, in one micro-batch.")
@click.option("--seq", type=POSITIVE, metavar="TOKENS", help="Tokens a row.")
@click.option("--tokens", type=TOKENS, default="14.8T", show_default=True, help="Length of the run: 14.8T, 300B.")
@click.option("--price-per-chip-hour", "price", type=PRICE, help="Dollars.")
@click.option("--search", is_flag=True, help="Try the legal meshes by arithmetic, and compile the best.")
@click.option("--compile-best", type=NATURAL, default=3, show_default=True, help="How many of them.")
@click.option("--no-compile", is_flag=True, help="By arithmetic alone, in a second.")
@click.option("--keep-hlo", metavar="FILE", default="", help="The compiled program, as text.")
@click.option("--out", metavar="FOLDER", help="plan.json, plan.png and launch files go here.")
@click.option("--json", "as_json", is_flag=True, help="The plan as JSON.")
def plan(
    preset: str,
    topology: str,
    slices: int,
    batch: int | None,
    seq: int | None,
    tokens: float,
    price: float | None,
    search: bool,
    compile_best: int,
    no_compile: bool,
    keep_hlo: str,
    out: str | None,
    as_json: bool,
    changes: dict[str, str],
):
    """Compile the training step of PRESET for a TPU slice, on a machine without a TPU, and say what it needs.

    HBM, traffic, time, days and cost; of every number, whether it is compiled (by libtpu, `pip install
    'dsjax[plan]'`), computed, published, assumed or measured. The mesh is that of --mesh.AXIS options; fsdp takes what
    is left.
    """
    from dsjax.plan import chips

    slice_ = chips.parse(topology)
    config, _ = find_config(preset)
    from dsjax.plan import job, report
    from sharding.mesh import show_axes

    config = job.planned(config, changes, batch, seq)
    for folder in filter(None, (out, keep_hlo and Path(keep_hlo).parent)):
        Path(folder).mkdir(parents=True, exist_ok=True)  # refused now, not after minutes of compiling
    compiling, compiled = not no_compile, None
    if search:
        found, config, compiled = job.best(config, slice_, compile_best, slices, compiling, say=note)
        if not as_json:
            print_table(["mesh", "GiB", "step s", "compiled GiB", "step s"], found, right=range(1, 5))
            click.echo()
    options = {"slices": slices, "tokens": tokens, "price": price, "keep_hlo": keep_hlo}
    rows, whole = job.plan(config, slice_, compiling=compiling, compiled=compiled, say=note, **options)
    if as_json:
        click.echo(json.dumps(whole, indent=2))
    else:
        mesh = show_axes(whole["mesh"]) or "one device"
        click.echo(
            f"{config.name} on {slice_.name}{f' x {slices}' if slices > 1 else ''}: {whole['chips']} chips, {mesh}"
        )
        print_table(None, report.table(rows), right=[1])
    if out is not None:
        config = job.on_slice(config, slice_, slices)
        job.save(Path(out), whole, config, slice_, slices, job.training_command(preset, config, changes))
        note(f"{out}: plan.json, plan.png and launch files")
