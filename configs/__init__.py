"""The presets: one file each, a function that returns a whole `dsjax.config.Config`, found here by name.

A preset of a published model describes the released network (long context, YaRN) and the published recipe of its
pre-training, which ran at 4K without YaRN; what was never published says so in a comment. `steps` is the published
tokens over the tokens of a step, the growing batch considered.
"""

from collections.abc import Callable

from configs.kimi_k2 import kimi_k2
from configs.moe_16b import moe_16b
from configs.moonlight import moonlight
from configs.r1 import r1
from configs.small import small
from configs.tiny import tiny
from configs.v2 import v2
from configs.v2_lite import v2_lite
from configs.v3 import v3
from dsjax.config import Config, ConfigError, nearest, show

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


def load(name: str) -> Config:
    """The preset of that name. Raises ConfigError with the nearest name for an unknown one."""
    preset = PRESETS.get(name.replace("-", "_"))
    if preset is None:
        raise ConfigError(f"{show(name)}: no such preset; the nearest is {nearest(name, PRESETS)[0]}")
    return preset()
