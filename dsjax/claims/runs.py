"""The trainings of a claim: taken to their last step where they are not there, and seen to have come to it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsjax.config import Config, ConfigError, field_rows, show
from dsjax.files import read_json, write_json
from dsjax.posttrain import grpo
from dsjax.train import loop
from dsjax.train.checkpoint import newest_step


def only_of(folder: Path, config: Config | None, **settings: Any) -> None:
    """Keeps with a claim's folder what its trainings are of. Raises ConfigError if they are of something else."""
    wanted = {} if config is None else {name: value for name, value, _ in field_rows(config)}
    wanted = json.loads(json.dumps(wanted | settings))
    kept = read_json(folder / "settings.json") or wanted
    for name in sorted(kept.keys() | wanted.keys()):
        if (old := kept.get(name)) != (new := wanted.get(name)):
            raise ConfigError(
                f"{folder}: its trainings are of {name}={show(old)}, not {show(new)}; choose another --out"
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "settings.json", wanted)


def pretrained(config: Config, run: Path, source: Path | None, say: Callable[[str], None]) -> Path:
    """A run trained to its last step, from another one's newest checkpoint if there is a source. Raises ConfigError as
    `whole` does."""
    if done(run) < config.steps:
        say(f"{run}: pre-training")
        loop.train(config, run, quiet=True, explicit={"steps": config.steps}, source=source)
    return whole(run, config.steps)


def reinforced(config: Config, run: Path, source: Path, say: Callable[[str], None], task=None) -> Path:
    """A run of policy optimisation from another run, taken to its last step. Raises ConfigError as `whole` does."""
    if done(run) < config.steps:
        say(f"{run}: reinforcement learning to step {config.steps}")
        begun = (run / "checkpoints").exists()
        explicit = {"steps": config.steps}
        grpo.train(config, run, source=None if begun else source, explicit=explicit, quiet=True, task=task)
    return whole(run, config.steps)


def done(run: Path) -> int:
    """Steps of a run that are saved: a kill may have lost those that its metrics tell of beyond."""
    return newest_step(run) or 0


def whole(run: Path, steps: int) -> Path:
    """The run. Raises ConfigError where it has not come to that step, or is one of more steps."""
    if (taken := done(run)) != steps:
        hint = "the same command goes on from there" if taken < steps else "choose another --out"
        raise ConfigError(f"{run}: stopped at step {taken} of {steps}; {hint}")
    return run
