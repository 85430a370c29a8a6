"""What changes over a run by plan: batch size, learning rate, MTP weight, router-bias speed. Plain numbers, no arrays.

Phases are parts of the run's tokens, as the papers state them (reference section 7.2).
"""

import bisect
import dataclasses
import functools
import math

from dsjax.config import Config, OptimizerConfig

# V3: constant to 10T of 14.8T tokens, cosine to a tenth over 4.3T, constant for 333B, 7.3e-6 / 2.2e-4 at the end.
_V3_DECAY_AT, _V3_FLOOR_AT, _V3_LAST_AT, _V3_LAST = 10 / 14.8, 14.3 / 14.8, 14.633 / 14.8, 7.3e-6 / 2.2e-4
_STEP_FACTOR = 0.316


@dataclasses.dataclass(frozen=True)
class Knobs:
    """The settings of one step."""

    step: int
    learning_rate: float
    mtp_weight: float
    bias_update_speed: float
    micro_batches: int


class Schedule:
    """A run's plan, step by step."""

    def __init__(self, config: Config):
        self.config = config
        self._rows = config.batch_size // config.accumulate  # of one micro-batch
        self._ramp = self._ramp_starts()

    @functools.cached_property
    def total_tokens(self) -> int:
        return self.first_row(self.config.steps) * self.config.seq_len

    def first_row(self, step: int) -> int:
        """Rows of the data that came before this step."""
        if step < len(self._ramp):
            return self._ramp[step]
        return self._ramp[-1] + (step - len(self._ramp) + 1) * self.config.batch_size

    def rows(self, step: int) -> tuple[int, int]:
        """Rows that this step takes: (first, one past the last)."""
        return self.first_row(step), self.first_row(step + 1)

    def step_at(self, tokens: int) -> int:
        """The first step that starts at or after this many tokens."""
        row = -(-tokens // self.config.seq_len)
        if row <= self._ramp[-1]:
            return bisect.bisect_left(self._ramp, row)
        return len(self._ramp) - 1 + -(-(row - self._ramp[-1]) // self.config.batch_size)

    def at(self, step: int) -> Knobs:
        """Settings of this step."""
        config = self.config
        first, last = self.rows(step)
        part = first * config.seq_len / self.total_tokens
        return Knobs(
            step=step,
            learning_rate=learning_rate(config.optimizer, step, part, config.steps),
            mtp_weight=config.mtp.loss_weight if part < config.mtp.switch_at else config.mtp.loss_weight_final,
            bias_update_speed=config.balance.bias_update_speed if part < config.balance.bias_update_until else 0.0,
            micro_batches=(last - first) // self._rows,
        )

    def _ramp_starts(self) -> list[int]:
        """First row of each step of the ramp, and of the first step of full size."""
        config, starts = self.config, [0]
        if config.batch_size_start is None:
            return starts
        n_start, n_end = config.batch_size_start // self._rows, config.accumulate
        while (part := starts[-1] * config.seq_len / config.batch_ramp_tokens) < 1:
            starts.append(starts[-1] + self._rows * (n_start + math.floor((n_end - n_start) * part)))
        return starts


def learning_rate(optimizer: OptimizerConfig, step: int, part: float, steps: int) -> float:
    """Rate of a step that starts after `part` of the run's tokens."""
    peak, warmup = optimizer.peak_lr, min(optimizer.warmup_steps, steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if optimizer.schedule == "cosine":
        rise = warmup / steps
        return peak * _cosine((part - rise) / max(1 - rise, 1e-9), optimizer.final_lr_ratio)
    if optimizer.schedule == "step":
        return peak * _STEP_FACTOR ** sum(part >= at for at in optimizer.step_at)
    if optimizer.schedule == "v3":
        if part >= _V3_LAST_AT:
            return peak * _V3_LAST
        return peak * _cosine((part - _V3_DECAY_AT) / (_V3_FLOOR_AT - _V3_DECAY_AT), 0.1)
    return peak


def _cosine(part: float, floor: float) -> float:
    part = min(max(part, 0.0), 1.0)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * part))
