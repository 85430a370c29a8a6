"""The trainings of a claim: taken to their last step where they are not there, and seen to have come to it."""

from collections.abc import Callable
from pathlib import Path

from dsjax.config import Config, ConfigError
from dsjax.train import loop
from dsjax.train.checkpoint import newest_step


def pretrained(config: Config, run: Path, source: Path | None, what: str, say: Callable[[str], None]) -> Path:
    """A run trained to its last step, from another one's newest checkpoint if there is a source; `what` it is, for a
    person. Raises ConfigError as `whole` does."""
    if done(run) < config.steps:
        say(f"{run}: {what}")
        loop.train(config, run, quiet=True, explicit={"steps": config.steps}, source=source)
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
