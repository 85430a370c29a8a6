"""`dsjax sft`: what comes after pre-training."""

import time
from pathlib import Path

import click

from dsjax.cli.find import find_model, with_devices
from dsjax.cli.verb import DEVICES, Number, Verb
from dsjax.config import ConfigError, show

BEGAN = time.time()  # of the program, for the ledger of its time
EPOCHS = Number(float, "a number greater than 0", lambda n: 0 < n < 1e6)


@click.command(
    cls=Verb,
    fields=True,
    short_help="Fine-tune a model on conversations.",
    options_metavar="--data FILE [--run PATH] [OPTIONS] [--FIELD=VALUE]...",
    epilog="""\b
Examples:
  dsjax sft runs/tiny --data chats.jsonl --template chat.jinja --optimizer.peak-lr=1e-3
  dsjax sft deepseek-ai/DeepSeek-V2-Lite --data chats.jsonl --data more.jsonl:0.5 --recipe=v2
  dsjax sft runs/v3-128k --data r1.jsonl --recipe=r1 --mesh.context=8

Any field of the configuration is an option: `dsjax config runs/tiny-sft` lists them with what they mean.""",
)
@click.argument("source", metavar="MODEL")
@click.option("--data", multiple=True, metavar="FILE", help="Conversations (.jsonl), or FILE:WEIGHT; several times.")
@click.option("--run", "run", metavar="PATH", help="Run folder; one that exists is resumed.  [default: runs/NAME-sft]")
@click.option("--recipe", metavar="NAME", help="Published settings: v3, r1, v2, moe_16b, distill_*.  [default: v3]")
@click.option("--epochs", type=EPOCHS, metavar="N", help="Passes over the conversations.  [default: the recipe's]")
@click.option("--template", metavar="FILE", help="Chat template (Jinja).  [default: the model's]")
@click.option("--last-turn", is_flag=True, help="Learn the assistant's last turn of each conversation alone.")
@DEVICES
@click.option("--quiet", is_flag=True, help="One line a step interval and no bar, for logs.")
def sft(
    source: str,
    data: tuple[str, ...],
    run: str | None,
    recipe: str | None,
    epochs: float | None,
    template: str | None,
    last_turn: bool,
    devices: int | None,
    quiet: bool,
    changes: dict[str, str],
):
    """Fine-tune MODEL on conversations: the assistant's words are learned, the others are read.

    MODEL is a run folder, a Hub checkpoint's folder, or a Hub name (OWNER/NAME), which is fetched. A line of a FILE is
    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}, put into the chat template,
    or {"prompt": ..., "completion": ...}, taken as it is.
    """
    changes = with_devices(changes, devices)
    if data and "data.sources" in changes:
        raise ConfigError(f"--data.sources={show(changes['data.sources'])}: expected --data or that, not both")
    folder = find_model(source)
    name = Path(source).name.partition("@")[0] if not Path(source).is_dir() else folder.absolute().name
    run_folder = Path(run) if run is not None else Path("runs") / f"{name}-sft"
    if run_folder.exists() and not run_folder.is_dir():
        raise ConfigError(f"--run={show(str(run_folder))}: expected a folder, and this is a file")
    from dsjax.infer.generate import continue_text
    from dsjax.posttrain.sft import sft as tune
    from dsjax.train.programs import keep_programs

    keep_programs()
    options = {"quiet": quiet, "sampler": continue_text, "began": BEGAN}
    chosen = {"recipe": recipe, "epochs": epochs, "template": template, "last_turn": last_turn}
    tune(folder, run_folder, data, **chosen, changes=changes, **options)
