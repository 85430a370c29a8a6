"""`dsjax train`."""

import time
from pathlib import Path

import click

from dsjax.cli.find import find_config, find_run, with_devices
from dsjax.cli.verb import DEVICES, PHASE, Verb
from dsjax.config import ConfigError, override, show

BEGAN = time.time()  # of the program, for the ledger of its time


@click.command(
    cls=Verb,
    fields=True,
    short_help="Pretrain a preset, or go on with a run.",
    options_metavar="[--run PATH] [OPTIONS] [--FIELD=VALUE]...",
    epilog="""\b
Examples:
  dsjax train tiny
  dsjax train tiny --steps 100 --optimizer.peak-lr=1e-3
  dsjax train tiny --run runs/mine --data.sources=notes.txt,code/:0.5
  dsjax train tiny --mesh.data=2 --mesh.expert=4 --devices=8
  dsjax train v3 --phase=32k --mesh.context=8

Any field of the configuration is an option: `dsjax config PRESET` lists them with what they mean.""",
)
@click.argument("preset")
@click.option("--run", "run", metavar="PATH", help="Run folder; one that exists is resumed.  [default: runs/PRESET]")
@PHASE
@click.option("--from", "source", metavar="RUN", help="Run whose newest checkpoint a new one begins with.")
@DEVICES
@click.option("--quiet", is_flag=True, help="One line a step interval and no bar, for logs.")
@click.option("--profile", metavar="FIRST:LAST", help="Steps to trace for XProf and TensorBoard, as in 10:13.")
def train(
    preset: str,
    run: str | None,
    phase: str | None,
    source: str | None,
    devices: int | None,
    quiet: bool,
    profile: str | None,
    changes: dict[str, str],
):
    """Pretrain PRESET, or go on with a run that was stopped.

    PRESET is a name that `dsjax presets` lists, a configuration file (.json), or the folder of a run to go on with.

    --from begins a new run with the weights, averages and optimizer state of another; of its network rope_scaling and
    max_position_embeddings may change. A --phase goes on from that before it: runs/v3, runs/v3-32k, runs/v3-128k.
    """
    config, folder = find_config(preset, phase)
    changes = with_devices(changes, devices)
    config = override(config, changes)
    if source is not None and run is None and phase is None:
        raise ConfigError(f"--from={show(source)}: expected --run=PATH with it, the folder of the new run")
    run_folder = Path(run) if run is not None else folder or Path("runs") / config.name
    if run_folder.exists() and not run_folder.is_dir():
        raise ConfigError(f"--run={show(str(run_folder))}: expected a folder, and this is a file")
    traced = None if profile is None else _steps(profile)
    from dsjax.infer.generate import continue_text
    from dsjax.train import loop
    from dsjax.train.programs import keep_programs

    begin = begin_with(preset, phase, run_folder) if source is None else find_run(source)
    keep_programs()
    options = {"quiet": quiet, "explicit": changes, "source": begin, "sampler": continue_text}
    loop.train(config, run_folder, **options, profile=traced, began=BEGAN)


def begin_with(preset: str, phase: str | None, run_folder: Path) -> Path | None:
    """The run of the phase before; None for the first phase, and for a run that has begun."""
    import configs

    name = configs.before(preset, phase) if phase is not None else None
    if name is None or (run_folder / "checkpoints").exists():
        return None
    if not (Path("runs") / name / "config.json").exists():
        raise ConfigError(f"--phase={phase}: goes on from runs/{name}, and there is no run; --from=RUN names another")
    return Path("runs") / name


def _steps(text: str) -> tuple[int, int]:
    """10:13 as numbers."""
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last)):
        raise ConfigError(f"--profile={show(text)}: expected FIRST:LAST, two steps counted from 1, as in 10:13")
    return int(first), int(last)
