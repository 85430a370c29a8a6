"""`dsjax needle`: what a model finds again in long text."""

import json
from pathlib import Path

import click

from dsjax.cli.find import find_model
from dsjax.cli.output import note, print_table
from dsjax.cli.verb import NATURAL, POSITIVE, Verb
from dsjax.config import ConfigError, show
from dsjax.files import write_json


class Numbers(click.ParamType):
    """Numbers separated by commas."""

    name = "numbers"

    def __init__(self, kind: type, expected: str, valid):
        self.kind, self.expected, self.valid = kind, expected, valid

    def convert(self, value, param, ctx):
        try:
            numbers = [self.kind(part) for part in value.split(",")] if isinstance(value, str) else value
        except ValueError:
            numbers = []
        if not numbers or not all(map(self.valid, numbers)):
            raise ConfigError(f"{param.opts[0]}={show(value)}: expected {self.expected}")
        return numbers


LENGTHS = Numbers(int, "whole numbers greater than 1, separated by commas", lambda n: 1 < n < 2**31)
DEPTHS = Numbers(float, "numbers from 0 to 1, separated by commas", lambda d: 0 <= d <= 1)


@click.command(
    cls=Verb,
    short_help="Look for needles in long text.",
    epilog="""\b
Examples:
  dsjax needle runs/tiny --lengths 64,128,256
  dsjax needle runs/tiny-2k --needle "@{key:1}={value:3};" --others 4""",
)
@click.argument("source", metavar="MODEL")
@click.option("--lengths", type=LENGTHS, metavar="N,N", help="Tokens a row.  [default: 1/8 to all of the context]")
@click.option("--depths", type=DEPTHS, metavar="D,D", help="Places, 0 = beginning.  [default: 0,0.25,0.5,0.75,1]")
@click.option("--trials", type=POSITIVE, default=10, show_default=True, help="Rows of each length and depth.")
@click.option("--needle", metavar="TEXT", help='The line.  [default: "The code of {key:4} is {value:4}."]')
@click.option("--others", type=NATURAL, default=0, show_default=True, help="Needles of other keys in the haystack.")
@click.option("--text", metavar="FILE", help="The haystack.  [default: the run's held-out text]")
@click.option("--seed", type=NATURAL, default=0, show_default=True, help="Of keys, values and hay.")
@click.option("--checkpoint", type=NATURAL, metavar="STEP", help="Step of the checkpoint.  [default: the newest]")
@click.option(
    "--out", metavar="FOLDER", help="Where needle.json and needle.png go.  [default: the run, or needle-MODEL]"
)
@click.option("--json", "as_json", is_flag=True, help="The result as JSON.")
def needle(source, lengths, depths, trials, needle, others, text, seed, checkpoint, out, as_json):
    """Hide a line in text, ask for it at the end, and map what MODEL finds by length and depth.

    The line has a key of letters and a value of digits, drawn anew in every row. The score is the share of the value's
    tokens that are the likeliest in their places. MODEL is a run folder, a Hub checkpoint's folder, or a Hub name.
    """
    folder = find_model(source)
    hay = None if text is None else Path(text).read_text(encoding="utf-8", errors="replace")
    if hay is not None and not hay.strip():
        raise ConfigError(f"--text={show(text)}: no text in it")
    from dsjax.hub.config import is_hub_folder
    from dsjax.infer import needle as needles

    if checkpoint is not None and is_hub_folder(folder):
        raise ConfigError(f"--checkpoint={checkpoint}: {folder} is no run folder, and has one set of weights")
    place = Path(out) if out is not None else Path(f"needle-{folder.name}") if is_hub_folder(folder) else folder
    result = needles.search(
        folder,
        lengths,
        depths or needles.DEPTHS,
        trials=trials,
        needle=needle or needles.NEEDLE,
        others=others,
        text=hay,
        seed=seed,
        step=checkpoint,
        say=note,
    )
    place.mkdir(parents=True, exist_ok=True)
    write_json(place / "needle.json", result)
    needles.draw([result], place / "needle.png")
    if as_json:
        return click.echo(json.dumps(result, indent=2))
    head, rows = needles.table(result)
    print_table(head, rows, right=range(1, len(head)))
    click.echo(f"\nshare of the value's tokens found, {trials} rows each ({place}/needle.png)")
