"""A task that any model can learn, and the smallest run of policy optimisation, in this process or in its own."""

import functools
from pathlib import Path
from types import MappingProxyType

import jax
import models
import runs

from dsjax.config import Config, GrpoConfig, replace, save
from dsjax.data.tokenizer import bytes_tokenizer
from dsjax.posttrain import grpo
from dsjax.posttrain.policy import Programs
from dsjax.posttrain.problem import Problem
from dsjax.train import layout
from dsjax.train.checkpoint import Checkpoints
from sharding.mesh import make_mesh

CLOCKS = ("sample_s", "learn_s", "seconds")  # beside those of runs.CLOCKS


class Low:
    """Answers of characters below @ are good: what a model without knowledge says one time in four."""

    name = "low"
    weights = MappingProxyType({"accuracy": 1.0, "short": 0.1})

    def problem(self, index: int) -> Problem:
        return Problem(f"{index % 5}=", "0")

    def heldout(self) -> list[Problem]:
        return [Problem("7=", "0"), Problem("8=", "0")]

    def judge(self, problems, texts) -> list[dict[str, float]]:
        low = [sum(c < "@" for c in text) / max(1, len(text)) for text in texts]
        return [{"accuracy": part, "short": 1 / (1 + len(text))} for part, text in zip(low, texts)]


def source(folder: Path, **optimizer) -> Path:
    """A run folder with a checkpoint, as pre-training leaves it; fields of OptimizerConfig by their names."""
    folder.mkdir(parents=True)
    config = base(folder)
    config = replace(config, optimizer=replace(config.optimizer, **optimizer))
    bytes_tokenizer().save(folder / "tokenizer.json")
    save(config, folder / "config.json")
    with jax.set_mesh(make_mesh(jax.devices()[:1])), Checkpoints(folder) as checkpoints:
        checkpoints.save(5, models.state(config), {"steps": [], "load": []})
    return folder


def base(folder: Path) -> Config:
    return runs.micro(folder / "texts")


def config(source: Path, **changes) -> Config:
    """Four steps of two groups of eight; fields of GrpoConfig and of Config by their names."""
    of_grpo = {
        "task": "low", "style": "plain", "group_size": 8, "max_tokens": 6, "eval_prompts": 2, "eval_samples": 2,
        "max_rows": 16,
    }  # fmt: skip
    for name in list(changes):
        if name in GrpoConfig.__dataclass_fields__:
            of_grpo[name] = changes.pop(name)
    given = {"steps": 4, "log_every": 1, "eval_every": 4, "checkpoint_every": 2, "batch_size": 16, "seq_len": 16}
    rate = changes.pop("rate", 3e-2)
    it = base(source)
    optimizer = replace(it.optimizer, peak_lr=rate, warmup_steps=0, schedule="constant")
    return replace(it, optimizer=optimizer, grpo=GrpoConfig(**of_grpo), **given | changes)


@functools.cache
def _programs(config: Config) -> Programs:
    return Programs(config)


def essence(config: Config) -> Config:
    """What the compiled programs of a run depend on."""
    kept = ("objective", "clip_low", "clip_high", "kl_weight", "temperature", "group_size")
    return replace(runs.essence(config), grpo=GrpoConfig(**{name: getattr(config.grpo, name) for name in kept}))


def share(patch, n_devices: int = 1) -> None:
    """A few devices, no pictures, and one compilation for all runs that differ only in what the loop does with them."""
    patch.setattr(layout, "devices", lambda: jax.devices()[:n_devices])
    patch.setattr(grpo, "Programs", lambda config: _programs(essence(config)))
    patch.setattr(grpo, "abstract_state", lambda config, mesh: runs.like(replace(config, grpo=None), mesh))
    patch.setattr(grpo.Recorder, "draw", lambda *_, **__: None)


def rows(folder: Path, kind: str | None = None) -> list[dict]:
    """Rows of metrics but for what a clock says."""
    found = [{name: v for name, v in row.items() if name not in CLOCKS} for row in runs.rows(folder)]
    return [row for row in found if kind in (None, row["kind"])]
