"""What changes over a run by plan: batch size, learning rate, MTP weight, router-bias speed. Plain numbers, no arrays.

The plan is data: phases of the learning rate, and the places where other settings change, in tokens or in parts of the
run's (`place`). Simple schedules are phases, too.
"""

import bisect
import dataclasses
import functools
import math

from dsjax.config import Config, OptimizerConfig, Phase

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
        self._phases = phases(config.optimizer, config.steps)
        in_tokens = self._phases[-1].until > 1
        self._warmup = config.optimizer.warmup_steps if in_tokens else min(config.optimizer.warmup_steps, config.steps)
        self._ends = [self.place(phase.until) for phase in self._phases]
        self._mtp_at, self._bias_until = map(self.place, (config.mtp.switch_at, config.balance.bias_update_until))

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

    def tokens(self, step: int) -> int:
        """Tokens that came before this step."""
        return self.first_row(step) * self.config.seq_len

    def place(self, when: float) -> float:
        """Tokens: a number up to 1 is a part of the run's, a greater one is tokens already."""
        return when * self.total_tokens if when <= 1 else when

    def at(self, step: int) -> Knobs:
        """Settings of this step."""
        config = self.config
        (first, last), tokens = self.rows(step), self.tokens(step)
        return Knobs(
            step=step,
            learning_rate=self._learning_rate(step, tokens),
            mtp_weight=config.mtp.loss_weight if tokens < self._mtp_at else config.mtp.loss_weight_final,
            bias_update_speed=config.balance.bias_update_speed if tokens < self._bias_until else 0.0,
            micro_batches=(last - first) // self._rows,
        )

    def changes(self) -> dict[str, list[float]]:
        """Where the plan turns, in tokens, by what turns: for pictures."""
        config = self.config
        ramp = [] if config.batch_size_start is None else [self._ramp[-1] * config.seq_len]
        mtp = config.model.num_nextn_predict_layers and config.mtp.loss_weight != config.mtp.loss_weight_final
        turns = {
            "learning_rate": [self.tokens(self._warmup), *self._ends],
            "batch": ramp,
            "mtp_weight": [self._mtp_at] if mtp else [],
            "bias_update_speed": [self._bias_until] if config.model.topk_method == "noaux_tc" else [],
        }
        return {name: [float(tokens) for tokens in places] for name, places in turns.items()}

    def _learning_rate(self, step: int, tokens: int) -> float:
        peak = self.config.optimizer.peak_lr
        if step < self._warmup:
            return peak * (step + 1) / self._warmup
        i = bisect.bisect_right(self._ends, tokens)
        if i == len(self._phases):
            return peak * self._phases[-1].rate
        start, before = (self._ends[i - 1], self._phases[i - 1].rate) if i else (self.tokens(self._warmup), 1.0)
        part = (tokens - start) / (self._ends[i] - start)
        return peak * _rate(self._phases[i], before, part)

    def _ramp_starts(self) -> list[int]:
        """First row of each step of the ramp, and of the first step of full size."""
        config, starts = self.config, [0]
        if config.batch_size_start is None:
            return starts
        n_start, n_end = config.batch_size_start // self._rows, config.accumulate
        while (part := starts[-1] * config.seq_len / config.batch_ramp_tokens) < 1:
            starts.append(starts[-1] + self._rows * (n_start + math.floor((n_end - n_start) * part)))
        return starts


def phases(optimizer: OptimizerConfig, steps: int) -> tuple[Phase, ...]:
    """The learning rate after the warm-up."""
    if optimizer.schedule == "phases":
        return optimizer.phases
    if optimizer.schedule == "cosine":
        rise = min(optimizer.warmup_steps, steps) / steps
        return Phase("constant", rise, 1.0), Phase("cosine", 1.0, optimizer.final_lr_ratio)
    falls = optimizer.step_at if optimizer.schedule == "step" else ()
    return tuple(Phase("constant", at, _STEP_FACTOR**i) for i, at in enumerate([*falls, (1.0, *falls)[-1]]))


def _rate(phase: Phase, before: float, part: float) -> float:
    """The rate over the peak, `part` of the way from the rate before it to its own."""
    if phase.shape == "constant":
        return phase.rate
    if phase.shape == "cosine":
        part = 0.5 * (1 - math.cos(math.pi * min(max(part, 0.0), 1.0)))
    return before + (phase.rate - before) * part
