"""`dsjax grpo`."""

from pathlib import Path

import click

from dsjax.cli.find import find_model, with_devices
from dsjax.cli.verb import DEVICES, Verb
from dsjax.config import Config, ConfigError, load, override, save, show


@click.command(
    cls=Verb,
    fields=True,
    short_help="Train a model on rewards (GRPO).",
    options_metavar="--task TASK [--run PATH] [OPTIONS] [--FIELD=VALUE]...",
    epilog="""\b
Examples:
  dsjax grpo runs/base --task parity:24 --style plain --steps 100 --optimizer.peak-lr=3e-4
  dsjax grpo runs/v3-sft --task problems.jsonl --recipe r1_1 --grpo.rewards=accuracy:1,format:1,language:0.1
  dsjax grpo runs/base-grpo --steps 400

Any field of the configuration is an option: `dsjax config RUN` lists them, those of grpo with the others.""",
)
@click.argument("source", metavar="MODEL")
@click.option("--task", metavar="TASK", help="A .jsonl file of problems, gym:NAME, or parity:BITS.")
@click.option("--run", "run", metavar="PATH", help="Run folder; one that exists is resumed.  [default: runs/NAME-grpo]")
@click.option("--recipe", metavar="NAME", help="Published settings: r1_zero, r1_1, r1_2, math, v3_2.  [default: small]")
@click.option("--style", metavar="NAME", help="How prompts are put: r1_zero, chat, plain.  [default: the recipe's]")
@DEVICES
@click.option("--quiet", is_flag=True, help="No bar, for logs.")
def grpo(
    source: str,
    task: str | None,
    run: str | None,
    recipe: str | None,
    style: str | None,
    devices: int | None,
    quiet: bool,
    changes: dict[str, str],
):
    """Train MODEL to give answers that earn rewards, sampled from itself in groups (DeepSeek-R1's GRPO).

    MODEL is a run folder, that of a GRPO run to go on with, or a Hub folder or name. What comes is a run folder like
    any other: `dsjax generate`, `serve`, `report` and `eval --task` take it.
    """
    changes = with_devices(changes, devices)
    for name, value in (("grpo.task", task), ("grpo.style", style)):
        if value is not None and name in changes:
            raise ConfigError(f"--{name}={show(changes[name])}: expected --{name[5:]} or that, not both")
        changes |= {} if value is None else {name: value}
    folder = find_model(source)
    from dsjax.hub.config import is_hub_folder

    hub = is_hub_folder(folder)
    kept = None if hub else load(folder / "config.json")
    begun = run is None and kept is not None and kept.grpo is not None and task is None and recipe is None
    name = source.partition("@")[0] if not Path(source).is_dir() else folder.absolute().name
    run_folder = folder if begun else Path(run or f"runs/{Path(name).name}-grpo")
    from dsjax.posttrain import grpo as loop
    from dsjax.posttrain.recipes import begin_with, check_same
    from dsjax.posttrain.sft import import_hub
    from dsjax.train.checkpoint import has_checkpoint, imported
    from dsjax.train.programs import keep_programs

    keep_programs()
    known = load(run_folder / "config.json") if begun or has_checkpoint(run_folder) else None
    came_to_nothing = hub and imported(run_folder)  # an import, or a first try that took no step
    if known is not None and known.grpo is not None and not came_to_nothing:
        if recipe is not None:
            check_same(known, recipe, changes)
        if hub:
            import_hub(folder, run_folder, Config(), quiet)  # it is there: raises if it is another folder's
        fresh = hub or folder.absolute() == run_folder.absolute()
        config, begin = override(known, changes), None if fresh else folder
        return loop.train(config, run_folder, source=begin, explicit=changes, quiet=quiet)
    if known is not None and not came_to_nothing:
        raise ConfigError(f"{run_folder}: holds a run of another kind; choose another --run")
    if "grpo.task" not in changes:
        raise ConfigError("--task: missing; expected a .jsonl file of problems, gym:NAME, or parity:BITS")
    if hub:
        import_hub(folder, run_folder, Config(), quiet)
        kept = load(run_folder / "config.json")
    config = begin_with(kept, recipe or "small", changes)
    if hub:
        save(config, run_folder / "config.json")
    return loop.train(config, run_folder, source=None if hub else folder, explicit=changes, quiet=quiet)
