"""`dsjax r1`: a pipeline of post-training."""

import json
from pathlib import Path

import click

from dsjax.cli.find import unknown_run
from dsjax.cli.output import note, print_table
from dsjax.cli.verb import Verb
from dsjax.config import ConfigError, show


@click.command(
    cls=Verb,
    short_help="A pipeline of stages: DeepSeek-R1's.",
    options_metavar="[--run PATH] [OPTIONS]",
    epilog="""\b
Examples:
  dsjax r1 --example > r1.toml
  dsjax r1 r1.toml --run runs/r1
  dsjax r1 runs/r1""",
)
@click.argument("recipe", metavar="RECIPE", required=False)
@click.option(
    "--run", "run", metavar="PATH", help="Its folder; one that exists is gone on with.  [default: runs/RECIPE]"
)
@click.option("--example", is_flag=True, help="Print DeepSeek-R1's recipe, with what each key means.")
@click.option("--json", "as_json", is_flag=True, help="The table as JSON.")
@click.option("--quiet", is_flag=True, help="No bars, for logs.")
def r1(recipe: str | None, run: str | None, example: bool, as_json: bool, quiet: bool):
    """Run the stages of RECIPE, a .toml file: fine-tuning, policy optimisation, rejection sampling, in any order.

    RECIPE may be the folder of a pipeline to go on with. Each stage is a run folder in it, which `dsjax generate`,
    `report` and `eval` take; at the end, and at any time by the same command, a table of what each one's model can do.
    """
    from dsjax.posttrain.stages import EXAMPLE

    if example:
        return click.echo(EXAMPLE.read_text(encoding="utf-8"), nl=False)
    if recipe is None:
        raise ConfigError("RECIPE: missing; `dsjax r1 --example > r1.toml` writes one to begin with")
    source = Path(recipe)
    if source.is_dir():
        if not (source / "recipe.toml").is_file():
            raise ConfigError(
                f"{show(recipe)}: expected a .toml file, or the folder of a pipeline (it has no recipe.toml)"
            )
        if run is not None and Path(run).absolute() != source.absolute():
            raise ConfigError(f"--run={show(run)}: expected none, with the folder of a pipeline")
    elif not source.is_file():
        raise ConfigError(unknown_run(recipe) if "." not in recipe else f"{show(recipe)}: no such file")
    folder = source if source.is_dir() else Path(run or Path("runs") / source.stem)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--run={show(str(folder))}: expected a folder, and this is a file")
    from dsjax.posttrain.r1 import run as run_stages
    from dsjax.posttrain.r1 import table
    from dsjax.train.programs import keep_programs

    keep_programs()
    result = run_stages(source, folder, quiet=quiet, say=note)
    if as_json:
        return click.echo(json.dumps(result, indent=2))
    head, rows = table(result)
    print_table(head, rows, right=range(2, len(head)))
    if result["done"]:
        click.echo(f"\n{folder / 'stages.png'}; a report of each stage: {folder}/*/report.html")
