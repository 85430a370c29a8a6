"""The command line: one command a verb; it parses, calls one function, prints.

Any field of the configuration is an option, `dsjax train tiny --optimizer.peak-lr=1e-3`. What a user gets wrong is
answered by one line on stderr and exit code 2. JAX is imported only by the commands that compute.
"""

import errno
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from dsjax import __version__
from dsjax.config import (
    Config,
    ConfigError,
    expected,
    field_names,
    field_rows,
    load,
    nearest,
    override,
    show,
    to_dict,
)
from dsjax.plan import count
from dsjax.plan.count import human, human_number

SHORT = {"overlap": "compute.overlap", "precision": "compute.precision"}  # options that need no section
OPTION = re.compile(r"--[A-Za-z][\w.-]*(=.*)?", re.DOTALL)  # "-- a comment" is a value, "--steps" is not


class Number(click.ParamType):
    """A number in a range, refused in the words that a configuration's fields use."""

    name = "number"

    def __init__(self, kind: type, expected: str, valid: Callable[[Any], bool]):
        self.kind, self.expected, self.valid = kind, expected, valid

    def convert(self, value, param, ctx):
        try:
            number = self.kind(value)
        except ValueError:
            number = None
        if number is None or not self.valid(number):
            raise ConfigError(f"{param.opts[0]}={show(value)}: expected {self.expected}")
        return number


POSITIVE = Number(int, "a whole number greater than 0", lambda n: n > 0)
NATURAL = Number(int, "a whole number at least 0", lambda n: 0 <= n < 2**32)
DEVICES = click.option("--devices", type=POSITIVE, metavar="N", help="Compute on N fake devices of the CPU.")
TEMPERATURE = Number(float, "a number at least 0 (0 = the likeliest token)", lambda t: 0 <= t < float("inf"))
PRICE = Number(float, "a price greater than 0", lambda p: 0 < p < float("inf"))
TOKENS = Number(human_number, "a number of tokens, as in 14.8T or 300B", lambda n: 0 < n < float("inf"))
PROBABILITY = Number(float, "a number greater than 0 and at most 1", lambda p: 0 < p <= 1)


class Verb(click.Command):
    """A command with options of its own and, if `fields`, every configuration field as one more.

    The fields arrive as the argument `changes`, dotted name -> text. Every option may be given once, before or after
    the arguments.
    """

    def __init__(self, *args, fields: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.fields = field_names() if fields else []

    def parse_args(self, ctx, args):
        if ctx.resilient_parsing:  # shell completion
            return super().parse_args(ctx, args)
        own = {name: p for p in self.get_params(ctx) if isinstance(p, click.Option) for name in p.opts}
        rest, given, queue = [], {}, list(args)
        while queue:
            arg = queue.pop(0)
            if arg == "--":
                rest += [arg, *queue]
                break
            name, equals, value = arg.partition("=")
            if len(arg) < 2 or arg[0] != "-":
                rest.append(arg)
                continue
            if name in own and own[name].is_flag:
                if equals:
                    raise ConfigError(f"{name}={show(value)}: takes no value; expected {name} alone")
                rest.append(arg)
                continue
            field = name[2:].replace("-", "_")
            field = SHORT.get(field, field)
            if name not in own and not self._is_field(name, field):
                raise ConfigError(_unknown_option(arg, [*own, *map(_option, self.fields)]))
            if not equals:
                if not queue or OPTION.fullmatch(queue[0]):
                    wanted = expected(field) if name not in own else _expected_by(own[name])
                    raise ConfigError(f"{name}: missing value; expected {wanted}")
                value = queue.pop(0)
            key = name if name in own else field
            if key in given:
                raise ConfigError(f"{name}={show(value)}: given twice, first as {show(given[key])}")
            given[key] = value
            if name in own:
                rest.append(f"{name}={value}")
        super().parse_args(ctx, rest)
        if self.fields:
            ctx.params["changes"] = {key: value for key, value in given.items() if key not in own}

    def _is_field(self, name: str, field: str) -> bool:
        """Whether it is a field, or a whole section of them, which `override` answers."""
        return name.startswith("--") and any(known == field or known.startswith(f"{field}.") for known in self.fields)


class Dsjax(click.Group):
    """The commands, with errors of one line."""

    command_class = Verb

    def parse_args(self, ctx, args):
        own = [name for p in self.get_params(ctx) for name in p.opts]
        if args and args[0].startswith("-") and args[0] not in own and not ctx.resilient_parsing:
            raise ConfigError(_unknown_option(args[0], own))
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx, args):
        if args[0] not in self.commands and not ctx.resilient_parsing:
            near = nearest(args[0], self.commands)[0]
            raise ConfigError(f"{show(args[0])}: no such command; the nearest is {near}")
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx):
        return list(self.commands)  # in the order of a first visit, not of the alphabet

    def main(self, *args, **kwargs):
        try:
            kwargs["standalone_mode"] = False
            code = super().main(*args, **kwargs)
            sys.stdout.flush()
        except BrokenPipeError:  # `dsjax presets | head -1`
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            code = 1
        except ConfigError as error:
            code = _fail(str(error))
        except click.exceptions.NoArgsIsHelpError as error:
            code = 2
            click.echo(error.format_message())
        except click.MissingParameter as error:
            code = _fail(f"{error.param.human_readable_name}: missing; {_see_help(error)}")
        except click.ClickException as error:
            message = error.format_message().rstrip(".")
            code = _fail(f"{message[:1].lower()}{message[1:]}; {_see_help(error)}")
        except click.Abort:  # Ctrl-C
            code = 130
        except (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError) as error:
            code = _fail(f"{error.filename}: {error.strerror}")
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
                raise
            code = _fail(f"{error.filename or 'disk'}: {error.strerror}")
        sys.exit(code if isinstance(code, int) else 0)


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


@cli.command(
    fields=True,
    short_help="Pretrain a preset, or go on with a run.",
    options_metavar="[--run PATH] [--devices N] [--quiet] [--FIELD=VALUE]...",
    epilog="""\b
Examples:
  dsjax train tiny
  dsjax train tiny --steps 100 --optimizer.peak-lr=1e-3
  dsjax train tiny --run runs/mine --data.sources=notes.txt,code/:0.5
  dsjax train tiny --mesh.data=2 --mesh.expert=4 --devices=8

Any field of the configuration is an option: `dsjax config PRESET` lists them with what they mean.""",
)
@click.argument("preset")
@click.option("--run", "run", metavar="PATH", help="Run folder; one that exists is resumed.  [default: runs/PRESET]")
@DEVICES
@click.option("--quiet", is_flag=True, help="One line a step interval and no bar, for logs.")
def train(preset: str, run: str | None, devices: int | None, quiet: bool, changes: dict[str, str]):
    """Pretrain PRESET, or go on with a run that was stopped.

    PRESET is a name that `dsjax presets` lists, a configuration file (.json), or the folder of a run to go on with.
    """
    config, folder = _find_config(preset)
    changes = _with_devices(changes, devices)
    config = override(config, changes)
    run_folder = Path(run) if run is not None else folder or Path("runs") / config.name
    if run_folder.exists() and not run_folder.is_dir():
        raise ConfigError(f"--run={show(str(run_folder))}: expected a folder, and this is a file")
    from dsjax.infer.generate import continue_text
    from dsjax.train import loop

    loop.train(config, run_folder, quiet=quiet, explicit=changes, sampler=continue_text)


@cli.command(
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
@click.option("--checkpoint", type=NATURAL, metavar="STEP", help="Step of the checkpoint.  [default: the newest]")
def generate(
    source: str,
    prompt: str | None,
    chat: bool,
    system: str | None,
    temperature: float,
    top_p: float,
    max_tokens: int,
    seed: int,
    checkpoint: int | None,
):
    """Continue a prompt with MODEL, streaming to standard output.

    MODEL is a run folder, a Hub checkpoint's folder, or a Hub name (OWNER/NAME), which is fetched. A prompt from
    standard input is taken without its last line break.
    """
    if system is not None and not chat:
        raise ConfigError(f"--system={show(system)}: expected --chat with it")
    folder = _find_model(source)
    from dsjax.hub.config import is_hub_folder

    if checkpoint is not None and is_hub_folder(folder):
        raise ConfigError(f"--checkpoint={checkpoint}: {folder} is no run folder, and has one set of weights")
    prompt = _read_prompt() if prompt in (None, "-") else prompt
    from dsjax.infer.generate import stream

    if sys.stdout.isatty() and not chat:
        sys.stdout.write(prompt)  # a reader wants the whole; a pipe, what is new
    options = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed, "step": checkpoint}
    for text in stream(folder, prompt, chat=chat, system=system, say=_note, **options):
        sys.stdout.write(text)
        sys.stdout.flush()
    if sys.stdout.isatty():
        sys.stdout.write("\n")


@cli.command(
    short_help="List the presets and what they cost.",
    epilog="""\b
Examples:
  dsjax presets
  dsjax presets --json""",
)
@click.option("--json", "as_json", is_flag=True, help="Exact numbers as JSON.")
def presets(as_json: bool):
    """List the presets: parameters, layers, experts, cache and FLOPs a token.

    `dsjax config PRESET` prints one whole; a new one is a file in configs/.
    """
    import configs

    rows = [count.summary(configs.load(name)) for name in configs.PRESETS]
    if as_json:
        return click.echo(json.dumps(rows, indent=2))
    body = []
    for row in rows:
        numbers, experts, kept = row["parameters"], row["experts"], row["cache_bytes_per_token"]
        v1 = row["attention"] == "mha"
        body.append(
            (
                row["name"],
                human(numbers["total"]),
                human(numbers["active_body_embed_head" if v1 else "active_body_head"]) + ("*" if v1 else " "),
                human(numbers["mtp"]) if numbers["mtp"] else "-",
                str(row["layers"]["total"]),
                f"{experts['routed']}+{experts['shared']}",
                str(experts["per_token"]),
                human(kept["own"]),
                human(kept["mha"]),
                human(kept["gqa8"]),
                human(row["train_flops_per_token"]["causal"]).replace("B", "G"),
            )
        )
    head = ("", "", "", "", "", "", "", "cache", "as", "as", "train")
    names = ("preset", "total", "active ", "MTP", "layers", "experts", "top", "bytes", "MHA", "GQA-8", "FLOPs")
    _print_table([f"{a}\n{b}" for a, b in zip(head, names)], body, right=range(1, 11))
    click.echo(
        "\ntotal   parameters, without those of multi-token prediction (MTP)\n"
        "active  parameters a token uses, the head's included; * the embedding's too, as\n"
        "        the DeepSeekMoE paper counts\n"
        "top     routed experts a token goes to; it passes the shared ones (+) as well\n"
        "cache   bfloat16 bytes a token, beside the same shape with multi-head and with\n"
        "        8-group attention\n"
        "FLOPs   of training, a token: forward and backward, causal, rows of seq_len"
    )


@cli.command(
    fields=True,
    short_help="Print every field of a configuration.",
    options_metavar="[--json] [--FIELD=VALUE]...",
    epilog="""\b
Examples:
  dsjax config v3
  dsjax config tiny --model.n-routed-experts=32 --json > mine.json
  dsjax train mine.json""",
)
@click.argument("source", metavar="NAME")
@click.option("--json", "as_json", is_flag=True, help="JSON that `dsjax train FILE.json` takes.")
def config(source: str, as_json: bool, changes: dict[str, str]):
    """Print every field of a configuration: its value and what it means.

    NAME is a preset, a run folder or a configuration file (.json). Any field is also an option of `dsjax train`,
    `dsjax eval` and this command: --seed=1, --model.hidden-size=256. A list is separated by commas, an empty optional
    value is `none`.
    """
    whole, _ = _find_config(source)
    whole = override(whole, changes)
    if as_json:
        return click.echo(json.dumps(to_dict(whole), indent=2))
    sections: dict[str, list] = {}
    for name, value, text in field_rows(whole):
        section, _, field = name.rpartition(".")
        sections.setdefault(section, []).append((f"  {field}", _as_typed(value), text))
    for section, rows in sections.items():
        title = f"{section}: --{section}.FIELD=VALUE" if section else f"{whole.name}: --FIELD=VALUE"
        click.echo(("\n" if section else "") + click.style(title, bold=True))
        _print_table(None, rows, widths=(28, 10))


@cli.command(
    "eval",
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
    folder = _find_run(run_folder)
    changes = _with_devices(changes, devices)
    override(load(folder / "config.json"), changes)  # a typo shows before JAX is imported
    import jax

    from dsjax.train import loop

    result = loop.evaluate(folder, changes, step=checkpoint)
    if jax.process_index() > 0:
        return
    if as_json:
        return click.echo(json.dumps(result, indent=2))
    rows = [(name, f"{value:.4f}" if isinstance(value, float) else _as_typed(value)) for name, value in result.items()]
    _print_table(None, rows, right=[1])


@cli.command(
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
    config, _ = _find_config(preset)
    from dsjax.plan import job, report
    from sharding.mesh import show_axes

    config = job.planned(config, changes, batch, seq)
    for folder in filter(None, (out, keep_hlo and Path(keep_hlo).parent)):
        Path(folder).mkdir(parents=True, exist_ok=True)  # refused now, not after minutes of compiling
    compiling, compiled = not no_compile, None
    if search:
        found, config, compiled = job.best(config, slice_, compile_best, slices, compiling, say=_note)
        if not as_json:
            _print_table(["mesh", "GiB", "step s", "compiled GiB", "step s"], found, right=range(1, 5))
            click.echo()
    options = {"slices": slices, "tokens": tokens, "price": price, "keep_hlo": keep_hlo}
    rows, whole = job.plan(config, slice_, compiling=compiling, compiled=compiled, say=_note, **options)
    if as_json:
        click.echo(json.dumps(whole, indent=2))
    else:
        mesh = show_axes(whole["mesh"]) or "one device"
        click.echo(
            f"{config.name} on {slice_.name}{f' x {slices}' if slices > 1 else ''}: {whole['chips']} chips, {mesh}"
        )
        _print_table(None, report.table(rows), right=[1])
    if out is not None:
        config = job.on_slice(config, slice_, slices)
        job.save(Path(out), whole, config, slice_, slices, job.training_command(preset, config, changes))
        _note(f"{out}: plan.json, plan.png and launch files")


@cli.group(
    cls=Dsjax,
    short_help="Test what the papers say, here.",
    epilog="""\b
Example:
  dsjax claims fp8""",
)
def claims():
    """Test a claim of the papers on a model that this machine can train; exit code 1 where it does not hold."""


@claims.command(
    "fp8",
    fields=True,
    short_help="FP8 training loses nothing.",
    options_metavar="[--seeds N] [--out FOLDER] [--json] [--FIELD=VALUE]...",
    epilog="""\b
Examples:
  dsjax claims fp8
  dsjax claims fp8 small --steps 2000 --seeds 5""",
)
@click.argument("preset", required=False)
@click.option("--seeds", type=POSITIVE, default=3, show_default=True, help="Trainings of each recipe.")
@click.option("--out", metavar="FOLDER", help="Runs, claim.json and claim.png.  [default: runs/claims-fp8-PRESET]")
@click.option("--json", "as_json", is_flag=True, help="The result as JSON.")
def claims_fp8(preset: str | None, seeds: int, out: str | None, as_json: bool, changes: dict[str, str]):
    """Train PRESET in bf16, in FP8 with DeepSeek's tiles and as three controls, from the same seeds, and compare.

    Without PRESET: `tiny`, twice as wide and at an eighth of its learning rate, for 200 steps, about an hour on two
    cores.

    The claim holds if the loss over the last 10% of the steps, mean of the seeds, is within 0.25% of bf16's. A stopped
    command goes on where it was.
    """
    from dsjax.claims import fp8

    config = fp8.small_model(_find_config("tiny")[0]) if preset is None else _find_config(preset)[0]
    config = override(config, changes)
    folder = Path(out) if out is not None else Path("runs") / f"claims-fp8-{config.name}"
    result = fp8.test(config, folder, seeds, _note)
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        head, rows = fp8.table(result)
        _print_table(head, rows, right=range(1, len(head)))
        click.echo(f"\n{result['claim']}: {'holds' if result['holds'] else 'does not hold'} ({folder}/claim.png)")
    if not result["holds"]:
        sys.exit(1)


@cli.group(
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
    folder = _find_model(source)
    from dsjax.hub.convert import import_checkpoint

    import_checkpoint(folder, target, dtype=dtype, say=_note)
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
        raise ConfigError(_unknown_run(source))
    from dsjax.hub.convert import export_checkpoint

    export_checkpoint(source, target, dtype=dtype, fp8_blocks=fp8, step=checkpoint, say=_note)
    click.echo(f"{target}: a Hub checkpoint")


def main():
    """The entry point `dsjax`."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal without Unicode shows a question mark
    sys.unraisablehook = _tell_unraisable
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C does: what is half-written is removed
    cli.main(prog_name="dsjax")


def _find_config(source: str) -> tuple[Config, Path | None]:
    """The configuration of a preset, of a .json file or of a run folder, and that folder."""
    import configs

    path = Path(source)
    if source.replace("-", "_") in configs.PRESETS:
        return configs.load(source), None
    if source and (path / "config.json").exists():
        return load(path / "config.json"), path
    if path.suffix == ".json":
        return load(path), None
    if source and path.is_dir():
        raise ConfigError(f"{show(source)}: expected a preset or a run folder, and this folder has no config.json")
    if "/" in source:
        raise ConfigError(_unknown_run(source))
    return configs.load(source), None


def _with_devices(changes: dict[str, str], devices: int | None) -> dict[str, str]:
    return changes if devices is None else changes | {"distributed.devices": str(devices)}


def _find_run(source: str) -> Path:
    path = Path(source)
    if not source or not path.is_dir():
        raise ConfigError(_unknown_run(source))
    if not (path / "config.json").exists():
        raise ConfigError(f"{show(source)}: expected a run folder, and this folder has no config.json")
    return path


def _find_model(source: str) -> Path:
    """A run folder or Hub folder; a Hub name is fetched, unless it stands for a path whose parent exists."""
    path = Path(source).expanduser()
    if source and not path.exists() and (source.count("/") != 1 or path.parent.is_dir()):
        raise ConfigError(_unknown_run(source))
    from dsjax.hub.fetch import resolve

    return resolve(source) if source and not path.is_dir() else _find_run(source)


def _unknown_run(source: str) -> str:
    parents = dict.fromkeys([Path("runs"), Path(source).parent])  # `dsjax generate tiny` means runs/tiny
    runs = [str(run.parent) for parent in parents for run in sorted(parent.glob("*/config.json"))]
    near = nearest(Path(source).name, [f"{Path(run).name}" for run in runs])[:1]
    found = next((run for run in runs if Path(run).name in near), None)
    hint = f"the nearest is {found}" if found else "`dsjax train tiny` makes runs/tiny"
    return f"{show(source)}: no such run folder; {hint}"


def _read_prompt() -> str:
    if sys.stdin.isatty():
        click.echo("dsjax: the prompt comes from the keyboard; Ctrl-D ends it", err=True)
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input: not UTF-8 at byte {error.start}") from None
    return text.removesuffix("\n").removesuffix("\r")


def _unknown_option(arg: str, known: Iterable[str]) -> str:
    known = list(known)
    option = arg.partition("=")[0].replace("_", "-")
    if option.startswith("--"):
        # Without the dashes, so that --peak-lr is seen to be the last part of --optimizer.peak-lr.
        near = [f"--{name}" for name in nearest(option[2:], [name[2:] for name in known if name.startswith("--")])]
    else:
        near = nearest(option, known)
    return f"{show(arg)}: no such option; the nearest is {' or '.join(near)}"


def _expected_by(option: click.Option) -> str:
    return getattr(option.type, "expected", f"a {(option.metavar or 'text').lower()}")


def _option(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def _as_typed(value: Any) -> str:
    if isinstance(value, float) and value != 0:
        value = float(f"{value:.6g}")
        return f"{value:g}" if value < 1e-3 or value >= 1e6 else str(value)
    return show(value)


def _note(text: str) -> None:
    click.echo(f"dsjax: {text}", err=True)


def _tell_unraisable(unraisable) -> None:
    """What happened where nothing can be raised; not the echo of a read or write of a checkpoint that has failed."""
    if "Event loop is closed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


def _see_help(error: click.ClickException) -> str:
    path = error.ctx.command_path if getattr(error, "ctx", None) else "dsjax"
    return f"see `{path} --help`"


def _fail(message: str) -> int:
    click.echo("dsjax: " + " ".join(message.split("\n")), err=True)
    return 2


def _print_table(head: list[str] | None, rows: list[tuple], right: Iterable[int] = (), widths: tuple[int, ...] = ()):
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 120  # a pipe has no edge at 80
    lines = [*rows, *zip(*(name.split("\n") for name in head))] if head else rows
    widest = [max(map(len, column)) for column in zip(*lines)]
    gap = 2 if head is None or sum(widest) + 2 * len(widest) <= console.width else 1
    table = Table(box=None, show_header=head is not None, padding=(0, gap, 0, 0), pad_edge=False)
    for i in range(len(rows[0])):
        table.add_column(
            head[i] if head else "",
            justify="right" if i in right else "left",
            min_width=widths[i] if i < len(widths) else None,
            no_wrap=i < 2 or head is not None,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*map(Text, row))
    with console.capture() as text:
        console.print(table)
    click.echo("\n".join(line.rstrip() for line in text.get().splitlines()))
