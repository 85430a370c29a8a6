"""The presets: one file each, a function that returns a whole `dsjax.config.Config`, found here by name.

A preset of a published model describes the released network (long context, YaRN) and the published recipe of its
pre-training, which ran at 4K without YaRN; what was never published says so in a comment. `steps` is the published
tokens over the tokens of a step, the growing batch considered.

A model whose long-context extension was published has phases (PHASES in its file): by name, in the order in which they
were run, what each changes of the preset. `load("v3", phase="32k")` is that phase's configuration.
"""

from collections.abc import Callable
from typing import Any

from configs.kimi_k2 import kimi_k2
from configs.moe_16b import moe_16b
from configs.moonlight import moonlight
from configs.r1 import r1
from configs.small import small
from configs.tiny import tiny
from configs.v2 import PHASES as V2_PHASES
from configs.v2 import v2
from configs.v2_lite import v2_lite
from configs.v3 import PHASES as V3_PHASES
from configs.v3 import v3
from dsjax.config import Config, ConfigError, nearest, override, replace, show

PRESETS: dict[str, Callable[[], Config]] = {
    "tiny": tiny,
    "small": small,
    "moe_16b": moe_16b,
    "v2_lite": v2_lite,
    "v2": v2,
    "v3": v3,
    "r1": r1,
    "moonlight": moonlight,
    "kimi_k2": kimi_k2,
}

PHASES: dict[str, dict[str, dict[str, Any]]] = {"v2": V2_PHASES, "v3": V3_PHASES}


def load(name: str, phase: str | None = None) -> Config:
    """The preset of that name, or one of its phases. Raises ConfigError with the nearest name for an unknown one.

    The first phase is pre-training and keeps the preset's name; a later one is named preset-phase.
    """
    name = name.replace("-", "_")
    preset = PRESETS.get(name)
    if preset is None:
        raise ConfigError(f"{show(name)}: no such preset; the nearest is {nearest(name, PRESETS)[0]}")
    if phase is None:
        return preset()
    known = phases(name)
    if phase not in known:
        raise ConfigError(f"--phase={show(phase)}: no phase of {name}; it has {', '.join(known)}")
    config = override(preset(), PHASES[name][phase])
    return config if phase == known[0] else replace(config, name=f"{name}-{phase}")


def phases(name: str) -> list[str]:
    """The phases of a preset in their order. Raises ConfigError where none were published."""
    name = name.replace("-", "_")
    if name not in PHASES:
        raise ConfigError(f"--phase: no phases of {name} were published; {' and '.join(PHASES)} have them")
    return list(PHASES[name])


def before(name: str, phase: str) -> str | None:
    """The name of the run that a phase goes on from: `v3` for 32k, `v3-32k` for 128k; None for the first phase."""
    known = phases(name)
    at = known.index(phase)
    return load(name, known[at - 1]).name if at else None
