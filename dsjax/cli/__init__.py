"""The command line: one command a verb; it parses, calls one function, prints.

Any field of the configuration is an option, `dsjax train tiny --optimizer.peak-lr=1e-3`. What a user gets wrong is
answered by one line on stderr and exit code 2. JAX is imported only by the commands that compute.
"""

import signal
import sys

import click

from dsjax import __version__
from dsjax.cli.claims import claims
from dsjax.cli.convert import convert
from dsjax.cli.data import data
from dsjax.cli.distill import distill
from dsjax.cli.evaluate import evaluate
from dsjax.cli.grpo import grpo
from dsjax.cli.model import generate
from dsjax.cli.needle import needle
from dsjax.cli.plan import plan
from dsjax.cli.posttrain import sft
from dsjax.cli.r1 import r1
from dsjax.cli.report import report
from dsjax.cli.serve import serve
from dsjax.cli.settings import config, presets
from dsjax.cli.train import train
from dsjax.cli.verb import Dsjax


@click.group(
    cls=Dsjax,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
First steps:
  dsjax train tiny                            pretrain on Python's sources
  dsjax generate runs/tiny --prompt "def "    and let the model write
  dsjax train --help                          more of a command""",
)
@click.version_option(__version__, message="dsjax %(version)s")
def cli():
    """DeepSeek's models in JAX: train them, talk to them, see what they cost."""


for command in (
    train,
    sft,
    grpo,
    distill,
    r1,
    generate,
    serve,
    presets,
    config,
    evaluate,
    needle,
    report,
    plan,
    data,
    claims,
    convert,
):  # in the order of a first visit
    cli.add_command(command)


def main():
    """The entry point `dsjax`."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal without Unicode shows a question mark
    sys.unraisablehook = _tell_unraisable
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C does: what is half-written is removed
    cli.main(prog_name="dsjax")


def _tell_unraisable(unraisable) -> None:
    """What happened where nothing can be raised; not the echo of a read or write of a checkpoint that has failed."""
    if "Event loop is closed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)
