"""`dsjax eval`: held-out text, problems with answers, or lm-eval's tasks."""

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from dsjax.cli.find import find_model, find_run, with_devices
from dsjax.cli.output import as_typed, note, print_table
from dsjax.cli.verb import DEVICES, NATURAL, POSITIVE, PROBABILITY, TEMPERATURE, Verb
from dsjax.config import DTYPES, ConfigError, EngineConfig, load, override, show
from dsjax.files import write_text

_OF_TASKS = ("samples", "temperature", "top_p", "seed", "style", "limit", "dtype", "max_rows", "out")
_OF_TASK = ("rewards", "max_tokens", "heldout", "best_by")


@click.command(
    "eval",
    cls=Verb,
    fields=True,
    short_help="Measure a trained model: on held-out text, or on tasks.",
    options_metavar="[--checkpoint STEP] [--devices N] [--json] [--FIELD=VALUE]...",
    epilog="""\b
Examples:
  dsjax eval runs/tiny
  dsjax eval runs/tiny --data.sources=other.txt --json
  dsjax eval runs/r1 --task "gym:chain_sum?max_terms=4" --samples 16
  dsjax eval runs/r1 --task problems.jsonl --samples 1 --temperature 0
  dsjax eval runs/tiny --tasks mine --include-path tasks""",
)
@click.argument("run_folder", metavar="MODEL")
@click.option("--checkpoint", type=NATURAL, metavar="STEP", help="Step of the checkpoint.  [default: the newest]")
@DEVICES
@click.option("--json", "as_json", is_flag=True, help="The numbers as JSON.")
@click.option("--task", metavar="SPEC", help="Problems: a .jsonl file, gym:NAME?OPTION=VALUE, parity:BITS.")
@click.option("--rewards", metavar="NAME:W,NAME:W", help="Weights of its rewards.  [default: the task's]")
@click.option("--heldout", is_flag=True, help="Of a file, those problems alone that training holds out.")
@click.option("--tasks", metavar="NAME,NAME", help="Tasks of lm-eval.")
@click.option("--include-path", metavar="FOLDER", help="Where their YAML files are.  [default: lm-eval's own]")
@click.option(
    "--samples", type=POSITIVE, help="Answers a problem.  [default: 16, 1 at temperature 0; with --tasks, theirs]"
)
@click.option(
    "--temperature", type=TEMPERATURE, help="0 takes the likeliest token.  [default: 0.6; with --tasks, theirs]"
)
@click.option(
    "--top-p", type=PROBABILITY, help="Sample from this much probability.  [default: 0.95; with --tasks, theirs]"
)
@click.option("--max-tokens", type=POSITIVE, help="Longest answer.  [default: 2048]")
@click.option("--seed", type=NATURAL, help="Of the samples.  [default: 0]")
@click.option(
    "--style",
    type=click.Choice(["plain", "r1_zero", "chat"]),
    help="How a problem is put.  [default: chat if the model has a template, else plain; with --tasks, plain]",
)
@click.option(
    "--best-by",
    type=click.Choice(["reward", "logprob"]),
    help="What best-of-n goes by: logprob, or rewards that need no answer key.  [default: logprob]",
)
@click.option("--limit", type=POSITIVE, metavar="N", help="The first N problems.  [default: all]")
@click.option("--dtype", type=click.Choice(DTYPES), help="Of the weights.  [default: the run's; bfloat16 from the Hub]")
@click.option("--max-rows", type=POSITIVE, help=f"Answers computed at once.  [default: {EngineConfig.max_rows}]")
@click.option(
    "--out", metavar="FILE", help="Keeps the answers, one a line; with --task, what it has is not asked again."
)
def evaluate(run_folder: str, checkpoint, devices, as_json: bool, changes: dict[str, str], task, tasks, **given):
    """Measure MODEL on the held-out text of its run, or on all text of other --data.sources.

    Bits a byte stand beside those of gzip -9 and xz -9 on the same bytes. Other text is read by the run's own
    tokenizer, and nothing is written.

    With --task, it is asked problems, and its answers are judged: pass@k, majority, the best of n. With --tasks,
    lm-eval's tasks are run on it. MODEL is a run folder then, a Hub checkpoint's folder, or a Hub name.
    """
    given = {name: value for name, value in given.items() if value is not None and value is not False}
    if task is None and tasks is None:
        return _heldout_text(run_folder, checkpoint, devices, as_json, changes, given)
    if task is not None and tasks is not None:
        raise ConfigError(f"--tasks={show(tasks)}: expected without --task")
    allowed = (*_OF_TASKS, *_OF_TASK) if task is not None else (*_OF_TASKS, "include_path")
    _refuse(given, allowed, "--tasks" if task is not None else "--task")
    _refuse({"devices": devices} if devices is not None else changes, (), "neither --task nor --tasks")
    folder = find_model(run_folder)
    from dsjax.hub.config import is_hub_folder

    if checkpoint is not None and is_hub_folder(folder):
        raise ConfigError(f"--checkpoint={checkpoint}: {folder} is no run folder, and has one set of weights")
    (_task if task is not None else _lm_eval)(folder, checkpoint, as_json, task or tasks, given)


def _heldout_text(run_folder, checkpoint, devices, as_json, changes, given) -> None:
    folder = find_run(run_folder)
    if "seed" in given:  # a field of the configuration as well
        changes = {**changes, "seed": str(given.pop("seed"))}
    _refuse(given, (), "--task")
    changes = with_devices(changes, devices)
    config = override(load(folder / "config.json"), changes)  # a typo shows before JAX is imported
    import jax

    from dsjax.posttrain.chats import whole_chats
    from dsjax.train import loop

    options = {} if config.data.learn == "text" else {"whole": whole_chats}
    result = loop.evaluate(folder, changes, step=checkpoint, **options)
    if jax.process_index() == 0:
        _show(result, as_json)


def _task(folder: Path, checkpoint: int | None, as_json: bool, spec: str, given: dict[str, Any]) -> None:
    from dsjax.posttrain.evaluate import Asking, evaluate
    from dsjax.posttrain.tasks import is_file, open_task

    if "heldout" in given and not is_file(spec):
        raise ConfigError(f"--heldout: expected with a file; {show(spec)} has held-out problems of its own")
    heldout = spec if is_file(spec) and "heldout" not in given else None
    out = _out(given)
    if given.get("temperature") == 0:
        given = {"samples": 1} | given
    asking = Asking(
        **{name: given[name] for name in ("samples", "temperature", "top_p", "max_tokens", "seed") if name in given},
        style=given.get("style") or ("chat" if _has_template(folder) else "plain"),
    )
    with open_task(spec, weights=given.get("rewards"), heldout=heldout) as task:
        problems = task.heldout()[: given.get("limit")]
        loaded, step = _load(folder, checkpoint, given)
        result = evaluate(
            loaded,
            task,
            problems,
            asking,
            best_by=given.get("best_by", "logprob"),
            max_rows=given.get("max_rows", EngineConfig.max_rows),
            out=out,
            label=str(folder) if step is None else f"{folder}, step {step}",
            progress=sys.stderr.isatty(),
            say=note,
        )
    _show(result, as_json)


def _lm_eval(folder: Path, checkpoint: int | None, as_json: bool, names: str, given: dict[str, Any]) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--tasks: needs lm-eval, which is not here: pip install 'dsjax[eval]'")
    if given.get("style") == "r1_zero":
        raise ConfigError("--style=r1_zero: expected plain or chat, with --tasks")
    from dsjax.posttrain.evaluate import Asking
    from dsjax.posttrain.lm import rows, run_tasks

    out, samples = _out(given), given.get("samples")
    sampling = {name: given[name] for name in ("temperature", "top_p") if name in given}
    if samples is not None and samples > 1:
        asking = Asking(samples, **sampling)
        sampling = {"temperature": asking.temperature, "top_p": asking.top_p}
    loaded, _ = _load(folder, checkpoint, given)
    results = run_tasks(
        loaded,
        [name.strip() for name in names.split(",")],
        Path(given["include_path"]) if "include_path" in given else None,
        samples=samples,
        sampling=sampling or None,
        limit=given.get("limit"),
        chat=given.get("style") == "chat",
        max_rows=given.get("max_rows", EngineConfig.max_rows),
        seed=given.get("seed", 0),
        progress=sys.stderr.isatty(),
    )
    if as_json:
        click.echo(json.dumps(results["results"], indent=2, default=str))
    else:
        table = [
            (task, metric, filter, f"{value:.4f}" if isinstance(value, float) else str(value),
             "" if error is None else f"{error:.4f}")
            for task, metric, filter, value, error in rows(results)
        ]  # fmt: skip
        print_table(["task", "metric", "filter", "value", "error"], table, right=[3, 4])
    if out is not None:
        lines = [{"task": name, **one} for name, of_task in results["samples"].items() for one in of_task]
        write_text(out, "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines))


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        return click.echo(json.dumps(result, indent=2))
    rows = [(name, f"{value:.4f}" if isinstance(value, float) else as_typed(value)) for name, value in result.items()]
    print_table(None, rows, right=[1])


def _refuse(given: dict[str, Any], allowed: tuple[str, ...], wanted: str) -> None:
    """Raises ConfigError for the first option that does not belong to what is asked."""
    for name, value in given.items():
        if name not in allowed:
            shown = "" if value is True else f"={show(value)}"
            raise ConfigError(f"--{name.replace('_', '-')}{shown}: expected with {wanted}")


def _out(given: dict[str, Any]) -> Path | None:
    out = Path(given["out"]) if "out" in given else None
    if out is not None and (not out.name or out.is_dir()):
        raise ConfigError(f"--out={show(given['out'])}: expected a file")
    if out is not None and not os.access(out.parent, os.W_OK):
        raise ConfigError(f"--out={show(given['out'])}: expected a file in a folder that is there, and can be written")
    return out


def _has_template(folder: Path) -> bool:
    from dsjax.hub.chat import ChatTemplate
    from dsjax.hub.files import HubError

    try:
        ChatTemplate.load(folder)
    except HubError:
        return False
    return True


def _load(folder: Path, checkpoint: int | None, given: dict[str, Any]):
    """The model, and its step if it is a run's."""
    from dsjax.hub.config import is_hub_folder
    from dsjax.hub.load import load as load_model
    from dsjax.train.checkpoint import Checkpoints

    step = None
    if not is_hub_folder(folder):
        with Checkpoints(folder, read_only=True) as checkpoints:
            step = checkpoints.find(checkpoint)
    return load_model(folder, given.get("dtype"), step=checkpoint, progress=sys.stderr.isatty(), say=note), step
