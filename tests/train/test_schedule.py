"""The plan of a run, against the papers' numbers."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import configs
from dsjax.config import Config, OptimizerConfig, replace
from dsjax.train.schedule import Schedule, learning_rate

TERA = 10**12


def v3_at(tokens: float):
    schedule = Schedule(configs.load("v3"))
    return schedule.at(min(schedule.step_at(int(tokens)), schedule.config.steps - 1))


def test_the_v3_rate_goes_through_its_published_phases():
    rates = [
        (3, 2.2e-4),
        (9.99, 2.2e-4),
        (12.15, (2.2e-4 + 2.2e-5) / 2),
        (14.3, 2.2e-5),
        (14.6, 2.2e-5),
        (14.64, 7.3e-6),
    ]
    for tokens, rate in [*rates, (14.8, 7.3e-6)]:
        assert v3_at(tokens * TERA).learning_rate == pytest.approx(rate, rel=1e-3), tokens


def test_v3_lowers_its_mtp_weight_at_10t_and_rests_the_bias_at_14_3t():
    assert (v3_at(9.99 * TERA).mtp_weight, v3_at(10.01 * TERA).mtp_weight) == (0.3, 0.1)
    assert (v3_at(14.29 * TERA).bias_update_speed, v3_at(14.31 * TERA).bias_update_speed) == (0.001, 0.0)


def test_the_rate_rises_in_a_line_over_the_warm_up():
    config = configs.load("v3")
    schedule = Schedule(config)
    for step in (0, 999, 1999):
        assert schedule.at(step).learning_rate == pytest.approx(2.2e-4 * (step + 1) / 2000)
    assert schedule.at(2000).learning_rate == 2.2e-4


def test_v2_falls_twice_by_0_316():
    schedule = Schedule(configs.load("v2"))
    rates = [schedule.at(schedule.step_at(int(part * 8.1 * TERA))).learning_rate for part in (0.59, 0.61, 0.91)]
    assert rates == pytest.approx([2.4e-4, 2.4e-4 * 0.316, 2.4e-4 * 0.316**2])


def test_cosine_ends_at_its_floor_and_constant_stays():
    cosine = OptimizerConfig(peak_lr=1.0, warmup_steps=10, schedule="cosine", final_lr_ratio=0.1)
    assert learning_rate(cosine, 10, 0.1, 100) == pytest.approx(1.0)
    assert learning_rate(cosine, 55, 0.55, 100) == pytest.approx(0.55)
    assert learning_rate(cosine, 99, 1.0, 100) == pytest.approx(0.1)
    assert learning_rate(replace(cosine, schedule="constant"), 99, 1.0, 100) == 1.0


def test_a_run_shorter_than_its_warm_up_reaches_the_peak():
    optimizer = OptimizerConfig(peak_lr=1.0, warmup_steps=2000)
    assert learning_rate(optimizer, 9, 0.9, 10) == 1.0


def test_the_v3_batch_grows_to_its_full_size_over_the_ramp():
    config = configs.load("v3")
    schedule = Schedule(config)
    taken = [schedule.at(schedule.step_at(int(tokens))).micro_batches for tokens in (0, 200e9, 468e9, 470e9, 5 * TERA)]
    assert taken == sorted(taken)
    assert (taken[0], taken[-2], taken[-1]) == (1, 5, 5)


def runs():
    """Small runs, with and without a ramp."""

    def make(rows, accumulate, start, ramp, steps, seq_len):
        start = None if start is None else rows * min(start, accumulate)
        return Config(
            batch_size=rows * accumulate, accumulate=accumulate, seq_len=seq_len, steps=steps, batch_size_start=start,
            batch_ramp_tokens=ramp if start else 0,
        )  # fmt: skip

    number = st.integers(1, 6)
    return st.builds(
        make, number, number, st.none() | number, st.integers(1, 2000), st.integers(1, 60), st.integers(2, 9)
    )


@given(runs())
@settings(max_examples=60, deadline=None)
def test_steps_take_all_rows_in_order_and_none_twice(config):
    schedule = Schedule(config)
    rows, end = config.batch_size // config.accumulate, 0
    for step in range(config.steps):
        first, last = schedule.rows(step)
        assert first == end == schedule.first_row(step)
        assert last - first == rows * schedule.at(step).micro_batches <= config.batch_size
        if config.batch_size_start is None:
            assert last - first == config.batch_size
        end = last
    assert schedule.total_tokens == end * config.seq_len


@given(runs(), st.integers(0, 3000))
@settings(max_examples=60, deadline=None)
def test_step_at_is_the_first_step_that_starts_no_earlier(config, tokens):
    schedule = Schedule(config)
    step = schedule.step_at(tokens)
    assert schedule.first_row(step) * config.seq_len >= tokens
    if step:
        assert schedule.first_row(step - 1) * config.seq_len < tokens


@given(runs())
@settings(max_examples=30, deadline=None)
def test_settings_are_finite_and_positive(config):
    schedule = Schedule(config)
    for step in range(config.steps):
        knobs = schedule.at(step)
        assert 0 < knobs.learning_rate < config.optimizer.peak_lr * (1 + 1e-9)
        assert math.isfinite(knobs.learning_rate)
        assert 1 <= knobs.micro_batches <= config.accumulate
