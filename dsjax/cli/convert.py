"""`dsjax convert`."""

from pathlib import Path

import click

from dsjax.cli.find import find_model, unknown_run
from dsjax.cli.output import note
from dsjax.cli.verb import NATURAL, Dsjax
from dsjax.config import ConfigError


@click.group(
    cls=Dsjax,
    short_help="Turn Hub checkpoints into runs, and back.",
    epilog="""\b
Examples:
  dsjax convert import deepseek-ai/DeepSeek-V2-Lite runs/lite
  dsjax train runs/lite --steps 100 --data.sources=notes/
  dsjax convert export runs/lite lite-mine""",
)
def convert():
    """Turn a checkpoint as it lies on the Hugging Face Hub into a run folder, and back."""


DTYPE = click.Choice(["float32", "bfloat16"])


@convert.command(
    "import",
    short_help="A run folder from a Hub checkpoint.",
    epilog="""\b
Examples:
  dsjax convert import DeepSeek-V3 runs/v3
  dsjax convert import moonshotai/Moonlight-16B-A3B runs/moonlight --dtype=float32""",
)
@click.argument("source", metavar="HF_FOLDER")
@click.argument("target", metavar="OUT")
@click.option("--dtype", type=DTYPE, help="Of the weights.  [default: the files'; bfloat16 from FP8]")
def import_(source: str, target: str, dtype: str | None):
    """Make the run folder OUT of HF_FOLDER, a checkpoint's folder or a Hub name (OWNER/NAME).

    `dsjax generate OUT` and `dsjax train OUT` go on from it. The folder is checked whole before any weight is read, FP8
    blocks are dequantised on the way, and memory stays at a few pieces of tensors.
    """
    folder = find_model(source)
    from dsjax.hub.convert import import_checkpoint

    import_checkpoint(folder, target, dtype=dtype, say=note)
    click.echo(f"{target}: `dsjax generate {target}` talks to it, `dsjax train {target}` trains it further")


@convert.command(
    short_help="A Hub checkpoint from a run.",
    epilog="""\b
Examples:
  dsjax convert export runs/tiny tiny-hf
  dsjax convert export runs/v3/checkpoints/100 v3-mine --fp8""",
)
@click.argument("source", metavar="RUN")
@click.argument("target", metavar="OUT")
@click.option("--dtype", type=DTYPE, help="Of the weights.  [default: as imported; bfloat16]")
@click.option("--fp8", is_flag=True, help="FP8 blocks, as the released V3 and R1.")
@click.option("--checkpoint", type=NATURAL, metavar="STEP", help="Step of the checkpoint.  [default: the newest]")
def export(source: str, target: str, dtype: str | None, fp8: bool, checkpoint: int | None):
    """Write the weights of RUN, a run folder or one of its checkpoints, as a Hub checkpoint into the folder OUT.

    transformers, vLLM and SGLang read it.
    """
    if not source or not Path(source).is_dir():
        raise ConfigError(unknown_run(source))
    from dsjax.hub.convert import export_checkpoint

    export_checkpoint(source, target, dtype=dtype, fp8_blocks=fp8, step=checkpoint, say=note)
    click.echo(f"{target}: a Hub checkpoint")
