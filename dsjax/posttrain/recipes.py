"""Settings of policy optimisation as published (reference sections 7.5 and 7.6), and those for a first try."""

from collections.abc import Mapping
from typing import Any

from dsjax.config import Config, ConfigError, GrpoConfig, field_rows, nearest, override, replace, show

# The optimizer, its warm-up and decay were not published; nor was R1-Zero's clipping, for which R1's stands.
_CONSTANT = {"optimizer.schedule": "constant", "optimizer.warmup_steps": 0, "optimizer.weight_decay": 0.0}
_R1 = _CONSTANT | {
    "optimizer.peak_lr": 3e-6,
    "batch_size": 512,
    "grpo.group_size": 16,
    "grpo.updates": 16,
    "grpo.objective": "r1",
    "grpo.reference_every": 400,
    "grpo.temperature": 1.0,
    "grpo.max_tokens": 32_768,
    "seq_len": 34_816,
}
RECIPES: dict[str, Mapping[str, Any]] = {
    "small": _CONSTANT | {"optimizer.peak_lr": 1e-5, "batch_size": 128, "grpo.group_size": 8},
    "math": _CONSTANT
    | {
        "optimizer.peak_lr": 1e-6,
        "batch_size": 1024,
        "grpo.group_size": 64,
        "grpo.objective": "grpo",
        "grpo.max_tokens": 1024,
        "seq_len": 2048,
    },
    "r1_zero": _R1 | {"grpo.style": "r1_zero", "steps": 10_400},
    "r1_1": _R1 | {"grpo.style": "chat"},
    "r1_2": _R1 | {"grpo.style": "chat", "grpo.temperature": 0.7, "steps": 1700},
    "v3_2": _R1 | {"grpo.style": "chat", "grpo.objective": "v3_2", "grpo.old_policy": "trainer"},
}


def begin_with(base: Config, recipe: str, changes: Mapping[str, Any]) -> Config:
    """The configuration of a new run from that of the model: a recipe's settings, and then the changes by dotted name.

    Where neither says, rows are as long as the model's were, answers may take half of them, and what pre-training does
    besides (growing batches, averages, spikes) is off. Raises ConfigError.
    """
    recipe_settings, changes = _settings(recipe), {key.replace("-", "_"): value for key, value in changes.items()}
    faults = replace(base.faults, on_spike="note", check_every=None)
    base = replace(base, batch_size_start=None, batch_ramp_tokens=0, keep_best=0, faults=faults)
    base = replace(base, accumulate=1, grpo=GrpoConfig(), batch_size=16)
    settings = {
        "steps": 100,
        "log_every": 1,
        "eval_every": 10,
        "checkpoint_every": 10,
        "mtp.loss_weight": base.mtp.loss_weight_final,
        "optimizer.ema_decay": None,
    }
    settings |= recipe_settings | changes
    settings.setdefault(
        "grpo.max_tokens", min(GrpoConfig().max_tokens, _number(settings, "seq_len", base.seq_len) // 2)
    )
    if "steps" not in changes:  # whole rounds
        updates = _number(settings, "grpo.updates", 1)
        settings["steps"] = -(-int(settings["steps"]) // updates) * updates
    return override(base, settings)


def check_same(known: Config, recipe: str, changes: Mapping[str, Any]) -> None:
    """Raises ConfigError where a run that has begun has other settings than a recipe's, but for steps and changes."""
    changed = {"steps", *(key.replace("-", "_") for key in changes)}
    has = {name: value for name, value, _ in field_rows(known)}
    for name, value in _settings(recipe).items():
        if name not in changed and has[name] != value:
            raise ConfigError(
                f"--recipe={show(recipe)}: its {name} is {show(value)}, and the run has {show(has[name])}; expected no "
                "--recipe, to go on, or another --run"
            )


def _settings(recipe: str) -> Mapping[str, Any]:
    name = recipe.replace("-", "_")
    if name not in RECIPES:
        raise ConfigError(f"--recipe={show(recipe)}: no such recipe; the nearest is {nearest(name, RECIPES)[0]}")
    return RECIPES[name]


def _number(settings: Mapping[str, Any], name: str, default: int) -> int:
    """A whole number above 0; the default for what is none, of which `override` says what is wrong."""
    value = str(settings.get(name, default))
    return int(value) if value.isdecimal() and int(value) else default
