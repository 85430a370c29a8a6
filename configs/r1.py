"""r1: DeepSeek-R1, R1-Zero and R1-0528: DeepSeek-V3's network and pre-training; post-training made the difference."""

from configs.v3 import v3
from dsjax.config import Config, replace


def r1() -> Config:
    return replace(v3(), name="r1")
