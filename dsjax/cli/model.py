"""`dsjax generate` and `dsjax eval`: what a trained model can do."""

import json
import sys
from pathlib import Path

import click

from dsjax.cli.find import find_model, find_run, with_devices
from dsjax.cli.output import as_typed, note, print_table
from dsjax.cli.verb import DEVICES, NATURAL, POSITIVE, PROBABILITY, TEMPERATURE, Verb
from dsjax.config import DTYPES, ConfigError, EngineConfig, load, override, show


@click.command(
    cls=Verb,
    short_help="Continue a prompt, or answer it.",
    epilog="""\b
Examples:
  dsjax generate runs/tiny --prompt "def " --temperature 0.7 --top-p 0.95
  dsjax generate deepseek-ai/DeepSeek-V2-Lite-Chat --chat --prompt "Who?"
  head -20 program.py | dsjax generate runs/tiny --max-tokens 100 > rest.py""",
)
@click.argument("source", metavar="MODEL")
@click.option("--prompt", metavar="TEXT", help="What to continue.  [default: standard input]")
@click.option("--chat", is_flag=True, help="The prompt is a user's message, in the model's chat template.")
@click.option("--system", metavar="TEXT", help="System message before it, with --chat.")
@click.option("--temperature", type=TEMPERATURE, default=0.7, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-p", type=PROBABILITY, default=0.95, show_default=True, help="Sample from this much probability.")
@click.option("--max-tokens", type=POSITIVE, default=200, show_default=True, help="Longest continuation.")
@click.option("--seed", type=NATURAL, default=0, show_default=True, help="The same seed writes the same text.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Of the weights.  [default: the run's; bfloat16 from the Hub]")
@click.option("--checkpoint", type=NATURAL, metavar="STEP", help="Step of the checkpoint.  [default: the newest]")
@click.option("--batch", metavar="FILE", help="Prompts, one a line as JSON; with --out.")
@click.option("--out", metavar="FILE", help="Where their continuations go, one a line; what it has is not done again.")
@click.option(
    "--max-rows",
    type=POSITIVE,
    default=EngineConfig.max_rows,
    show_default=True,
    help="Prompts computed at once, with --batch.",
)
def generate(
    source: str,
    prompt: str | None,
    chat: bool,
    system: str | None,
    temperature: float,
    top_p: float,
    max_tokens: int,
    seed: int,
    dtype: str | None,
    checkpoint: int | None,
    batch: str | None,
    out: str | None,
    max_rows: int,
):
    """Continue a prompt with MODEL, streaming to standard output.

    MODEL is a run folder, a Hub checkpoint's folder, or a Hub name (OWNER/NAME), which is fetched. A prompt from
    standard input is taken without its last line break.
    """
    if (batch is None) != (out is None) or (batch is not None and (prompt is not None or chat)):
        raise ConfigError("--batch: expected with --out, and without --prompt and --chat")
    if system is not None and not chat:
        raise ConfigError(f"--system={show(system)}: expected --chat with it")
    folder = find_model(source)
    from dsjax.hub.config import is_hub_folder

    if checkpoint is not None and is_hub_folder(folder):
        raise ConfigError(f"--checkpoint={checkpoint}: {folder} is no run folder, and has one set of weights")
    options = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed}
    if batch is not None:
        from dsjax.hub.load import load as load_model
        from dsjax.infer.batch import run_batch

        progress = sys.stderr.isatty()
        loaded = load_model(folder, dtype, step=checkpoint, progress=progress, say=note)
        n = run_batch(
            loaded, Path(batch), Path(out), EngineConfig(max_rows=max_rows), options, progress=progress, say=note
        )
        return note(f"{n} continuations in {out}")
    prompt = read_prompt() if prompt in (None, "-") else prompt
    from dsjax.infer.generate import stream

    if sys.stdout.isatty() and not chat:
        sys.stdout.write(prompt)  # a reader wants the whole; a pipe, what is new
    for text in stream(folder, prompt, chat=chat, system=system, say=note, dtype=dtype, step=checkpoint, **options):
        sys.stdout.write(text)
        sys.stdout.flush()
    if sys.stdout.isatty():
        sys.stdout.write("\n")


@click.command(
    "eval",
    cls=Verb,
    fields=True,
    short_help="Measure a trained model on held-out text.",
    options_metavar="[--checkpoint STEP] [--devices N] [--json] [--FIELD=VALUE]...",
    epilog="""\b
Examples:
  dsjax eval runs/tiny
  dsjax eval runs/tiny --data.sources=other.txt --json""",
)
@click.argument("run_folder")
@click.option("--checkpoint", type=NATURAL, metavar="STEP", help="Step of the checkpoint.  [default: the newest]")
@DEVICES
@click.option("--json", "as_json", is_flag=True, help="The numbers as JSON.")
def evaluate(run_folder: str, checkpoint: int | None, devices: int | None, as_json: bool, changes: dict[str, str]):
    """Measure the model of RUN_FOLDER on its held-out text, or on all text of other --data.sources.

    Bits a byte stand beside those of gzip -9 and xz -9 on the same bytes. Other text is read by the run's own
    tokenizer, and nothing is written.
    """
    folder = find_run(run_folder)
    changes = with_devices(changes, devices)
    config = override(load(folder / "config.json"), changes)  # a typo shows before JAX is imported
    import jax

    from dsjax.posttrain.chats import whole_chats
    from dsjax.train import loop

    options = {} if config.data.learn == "text" else {"whole": whole_chats}
    result = loop.evaluate(folder, changes, step=checkpoint, **options)
    if jax.process_index() > 0:
        return
    if as_json:
        return click.echo(json.dumps(result, indent=2))
    rows = [(name, f"{value:.4f}" if isinstance(value, float) else as_typed(value)) for name, value in result.items()]
    print_table(None, rows, right=[1])


def read_prompt() -> str:
    if sys.stdin.isatty():
        click.echo("dsjax: the prompt comes from the keyboard; Ctrl-D ends it", err=True)
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input: not UTF-8 at byte {error.start}") from None
    return text.removesuffix("\n").removesuffix("\r")
