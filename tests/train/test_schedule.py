"""The plan of a run, against the papers' numbers."""

import json
import math
import re
import time

import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import configs
from dsjax.config import Config, ConfigError, OptimizerConfig, Phase, load, override, replace
from dsjax.train.recipe_picture import curves, draw_recipe
from dsjax.train.schedule import Schedule

TERA = 10**12
GIGA = 10**9


def at(name: str, tokens: float):
    """Settings of the first step that starts no earlier."""
    schedule = Schedule(configs.load(name))
    return schedule.at(schedule.step_at(int(tokens)))


def before(name: str, tokens: float):
    """Settings of the last step that starts earlier."""
    schedule = Schedule(configs.load(name))
    return schedule.at(schedule.step_at(int(tokens)) - 1)


GOLDEN = [  # preset, tokens, rate of the last step before, and of the first one from there (reference sections 7.2, 12)
    ("v3", 10 * TERA, 2.2e-4, 2.2e-4),
    ("v3", 12.15 * TERA, 1.21e-4, 1.21e-4),
    ("v3", 14.3 * TERA, 2.2e-5, 2.2e-5),
    ("v3", 14.633 * TERA, 2.2e-5, 7.3e-6),
    ("v3", 14.8 * TERA, 7.3e-6, 7.3e-6),
    ("v2", 0.6 * 8.1 * TERA, 2.4e-4, 2.4e-4 * 0.316),
    ("v2", 0.9 * 8.1 * TERA, 2.4e-4 * 0.316, 2.4e-4 * 0.316**2),
    ("v2_lite", 0.8 * 5.7 * TERA, 4.2e-4, 4.2e-4 * 0.316),
    ("v2_lite", 0.9 * 5.7 * TERA, 4.2e-4 * 0.316, 4.2e-4 * 0.316**2),
    ("moe_16b", 0.8 * 106_449 * 4608 * 4096, 4.2e-4, 4.2e-4 * 0.316),
    ("moe_16b", 0.9 * 106_449 * 4608 * 4096, 4.2e-4 * 0.316, 4.2e-4 * 0.316**2),
    ("moonlight", 2000 * 2048 * 8192, 4.2e-4, 4.2e-4),  # 33B
    ("moonlight", 5.2 * TERA, 4.2e-5, 4.2e-5),
    ("moonlight", 5.2 * TERA + 100 * 4096 * 8192, 1e-4, 1e-4),
    ("moonlight", 5.45 * TERA, 5e-5, 5e-5),
    ("moonlight", 5.7 * TERA, 0, 0),
    ("kimi_k2", 10 * TERA, 2e-4, 2e-4),
    ("kimi_k2", 15.5 * TERA, 2e-5, 2e-5),
    ("kimi_k2", 15.9 * TERA, 7e-6, 7e-6),
]


@pytest.mark.parametrize(("name", "tokens", "last", "first"), GOLDEN)
def test_rates_at_the_published_boundaries(name, tokens, last, first):
    near = 5.9e-7 if name == "moonlight" else 0  # one of the hundred steps to 1e-4
    assert before(name, tokens).learning_rate == pytest.approx(last, rel=5e-4, abs=near)
    assert at(name, tokens).learning_rate == pytest.approx(first, rel=5e-4, abs=near)
    if last == first != 0:
        assert before(name, tokens).learning_rate == pytest.approx(at(name, tokens).learning_rate, rel=0.015)


def test_mtp_weight_and_bias_speed_change_at_their_published_tokens():
    assert (before("v3", 10 * TERA).mtp_weight, at("v3", 10 * TERA).mtp_weight) == (0.3, 0.1)
    for name, tokens in (("v3", 14.3 * TERA), ("moonlight", 5.2 * TERA)):
        assert (before(name, tokens).bias_update_speed, at(name, tokens).bias_update_speed) == (0.001, 0.0)


def test_batches_grow_over_their_published_tokens():
    for name, tokens, n in (("v3", 469 * GIGA, 5), ("v2", 225 * GIGA, 4), ("moonlight", 200 * GIGA, 2)):
        assert (at(name, 0).micro_batches, before(name, tokens).micro_batches) == (1, n - 1), name
        assert at(name, tokens).micro_batches == n, name


def test_moonlight_rises_to_1e_4_in_a_hundred_steps():
    schedule = Schedule(configs.load("moonlight"))
    start = schedule.step_at(int(5.2 * TERA))
    rates = [schedule.at(start + i).learning_rate for i in range(102)]
    assert rates == pytest.approx([4.2e-5 + 5.8e-5 * i / 100 for i in range(101)] + [rates[101]], rel=0.02)
    assert rates[101] < rates[100]


def test_a_short_run_of_a_published_preset_follows_its_tokens_and_tiny_scales():
    short, tiny = replace(configs.load("v3"), steps=20), configs.load("tiny")
    assert [Schedule(short).at(step) for step in range(20)] == [Schedule(configs.load("v3")).at(s) for s in range(20)]
    for steps in (100, 300):
        schedule = Schedule(replace(tiny, steps=steps))
        assert schedule.at(30).learning_rate == pytest.approx(4e-3)
        assert schedule.at(30 + (steps - 30) // 2).learning_rate == pytest.approx(0.55 * 4e-3, rel=0.02)
        assert schedule.at(steps - 1).learning_rate == pytest.approx(0.1 * 4e-3, rel=0.02)


def test_more_steps_lengthen_parts_and_leave_tokens_alone():
    phases = Phase("constant", 0.5, 1.0), Phase("linear", 1.0, 0.5)
    optimizer = OptimizerConfig(peak_lr=1.0, warmup_steps=0, schedule="phases", phases=phases)
    config = Config(steps=10, batch_size=1, seq_len=2, optimizer=optimizer)
    rates = [Schedule(replace(config, steps=n)).at(7).learning_rate for n in (10, 20)]
    assert rates == pytest.approx([0.8, 1.0])
    places = tuple(replace(p, until=p.until * 20) for p in phases)
    config = replace(config, optimizer=replace(optimizer, phases=places))
    rates = [Schedule(replace(config, steps=n)).at(7).learning_rate for n in (10, 20)]
    assert rates == pytest.approx([0.8, 0.8])
    assert Schedule(replace(config, steps=20)).at(19).learning_rate == 0.5  # the last rate stays


def test_the_rate_rises_in_a_line_over_the_warm_up():
    schedule = Schedule(configs.load("v3"))
    for step in (0, 999, 1999):
        assert schedule.at(step).learning_rate == pytest.approx(2.2e-4 * (step + 1) / 2000)
    assert schedule.at(2000).learning_rate == 2.2e-4


def rate(optimizer: OptimizerConfig, step: int, steps: int) -> float:
    return Schedule(Config(batch_size=1, steps=steps, optimizer=optimizer)).at(step).learning_rate


def test_cosine_ends_at_its_floor_and_constant_stays():
    cosine = OptimizerConfig(peak_lr=1.0, warmup_steps=10, schedule="cosine", final_lr_ratio=0.1)
    assert rate(cosine, 10, 100) == pytest.approx(1.0)
    assert rate(cosine, 55, 100) == pytest.approx(0.55)
    assert rate(cosine, 99, 100) == pytest.approx(0.1, rel=0.01)
    assert rate(replace(cosine, schedule="constant"), 99, 100) == 1.0
    assert rate(replace(cosine, warmup_steps=0), 0, 100) == 1.0


def test_a_run_shorter_than_its_warm_up_reaches_the_peak():
    assert rate(OptimizerConfig(peak_lr=1.0, warmup_steps=2000), 9, 10) == 1.0


def old_rate(kind: str, part: float, step: int, steps: int, warmup: int, step_at) -> float:
    """The rate over the peak of a run from before phases, whose places were parts of its tokens."""

    def cosine(part, floor):
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(max(part, 0.0), 1.0)))

    warmup = min(warmup, steps)
    if step < warmup:
        return (step + 1) / warmup
    if kind == "cosine":
        return cosine((part - warmup / steps) / max(1 - warmup / steps, 1e-9), 0.1)
    if kind == "step":
        return 0.316 ** sum(part >= at for at in step_at)
    if kind == "v3":
        return 7.3e-6 / 2.2e-4 if part >= 14.633 / 14.8 else cosine((part - 10 / 14.8) / (4.3 / 14.8), 0.1)
    return 1.0


@pytest.mark.parametrize("kind", ["constant", "cosine", "step", "v3"])
def test_a_run_from_before_phases_keeps_its_rates(tmp_path, kind):
    optimizer = {"peak_lr": 2.2e-4, "warmup_steps": 9, "schedule": kind, "step_at": [0.6, 0.9]}
    old = {
        "steps": 400, "batch_size": 8, "accumulate": 4, "batch_size_start": 2, "batch_ramp_tokens": 20_000,
        "optimizer": optimizer, "mtp": {"switch_at": 10 / 14.8}, "balance": {"bias_update_until": 14.3 / 14.8},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(old))
    schedule = Schedule(load(tmp_path / "config.json"))
    for step in range(400):
        part, knobs = schedule.tokens(step) / schedule.total_tokens, schedule.at(step)
        wanted = 2.2e-4 * old_rate(kind, part, step, 400, 9, (0.6, 0.9))
        assert knobs.learning_rate == pytest.approx(wanted, rel=1e-6), step
        assert knobs.mtp_weight == (0.3 if part < 10 / 14.8 else 0.1)
        assert knobs.bias_update_speed == (0.001 if part < 14.3 / 14.8 else 0.0)


def test_phases_and_places_are_checked():
    for phases, message in (
        ("x", "optimizer.phases=x: expected SHAPE:UNTIL:RATE, separated by commas"),
        ("sine:1:1", "optimizer.phases.shape=sine: expected one of constant, linear, cosine"),
        ("linear:x:1", "optimizer.phases.until=x: expected a number at least 0"),
        ("linear:0.9:1,linear:0.5:0", "optimizer.phases=linear:0.9:1,linear:0.5:0: expected rising numbers of tokens"),
        (
            "linear:0.9:1,linear:1e9:0",
            "optimizer.phases=linear:0.9:1,linear:1000000000:0: expected tokens, or parts of ",
        ),
        ("", "optimizer.phases: expected one SHAPE:UNTIL:RATE or more with optimizer.schedule=phases"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            override(configs.load("tiny"), {"optimizer.schedule": "phases", "optimizer.phases": phases})
    changes = {"optimizer.schedule": "phases", "optimizer.phases": "constant:10e12:1,cosine:14.3e12:0.1"}
    phases = override(configs.load("tiny"), changes).optimizer.phases
    assert phases == (Phase("constant", 10e12, 1.0), Phase("cosine", 14.3e12, 0.1))


def test_all_of_v3_is_evaluated_in_seconds_and_drawn(tmp_path):
    schedule = Schedule(configs.load("v3"))
    started = time.process_time()
    rates = np.array([schedule.at(step).learning_rate for step in range(0, schedule.config.steps, 100)])
    assert time.process_time() - started < 2  # with the checks of types, which take nine tenths of it
    tokens, values = curves(schedule)
    steps = [schedule.step_at(int(t)) for t in tokens[:-1]]
    assert tokens[-1] == schedule.total_tokens and steps == sorted(set(steps))
    assert values["learning_rate"].max() == rates.max() and values["learning_rate"][-1] == rates[-1]
    assert (values["batch"][0], values["batch"][-1]) == (3072, 15_360)
    for name in ("v3", "v2", "tiny"):
        draw_recipe(configs.load(name), tmp_path / f"{name}.png")
        assert plt.imread(tmp_path / f"{name}.png").std() > 0.05


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
