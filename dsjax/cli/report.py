"""`dsjax report`."""

from pathlib import Path

import click

from dsjax import __version__
from dsjax.cli.find import find_run
from dsjax.cli.output import note
from dsjax.cli.verb import Verb
from dsjax.config import ConfigError, load, show


@click.command(
    cls=Verb,
    short_help="One HTML page of a run.",
    epilog="""\b
Examples:
  dsjax report runs/tiny
  dsjax report runs/tiny --out tiny.html --open""",
)
@click.argument("run")
@click.option("--out", metavar="FILE.html", help="The page.  [default: RUN/report.html]")
@click.option("--open", "opened", is_flag=True, help="Show it in the browser.")
def report(run: str, out: str | None, opened: bool):
    """Make a page of RUN, a run folder: curves, expert loads, where the time went, incidents, configuration.

    The page is one file that needs no network. A run that is still going can be looked at too.
    """
    from dsjax.train import page

    folder = find_run(run)
    path = folder / "report.html" if out is None else Path(out)
    if not path.name or path.is_dir():
        raise ConfigError(f"--out={show(out)}: expected a file")
    size = page.write(folder, path, _preset(folder), __version__)
    note(f"{path}: {page.size(size)}")
    if opened:
        click.launch(path.absolute().as_uri())


def _preset(folder: Path):
    """The preset that the run's configuration is named after; None if there is none."""
    import configs

    try:
        return configs.load(load(folder / "config.json").name)
    except ConfigError:
        return None
