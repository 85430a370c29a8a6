"""The presets: they load, describe the published runs, and go through JSON unchanged."""

import json

import numpy as np
import pytest

import configs
from dsjax.config import ConfigError, from_dict, load, replace, save, to_dict
from dsjax.model.rope import softmax_scale
from dsjax.plan.count import parameters
from dsjax.train.schedule import Schedule

PUBLISHED = {  # tokens, the batch in rows at first and at last, the highest learning rate
    "v2_lite": (5.7e12, 4608, 4608, 4.2e-4),
    "v2": (8.1e12, 2304, 9216, 2.4e-4),
    "v3": (14.8e12, 3072, 15360, 2.2e-4),
    "r1": (14.8e12, 3072, 15360, 2.2e-4),
    "moonlight": (5.7e12, 2048, 4096, 4.2e-4),
    "kimi_k2": (15.5e12, 16384, 16384, 2e-4),
}


@pytest.mark.parametrize("name", configs.PRESETS)
def test_a_preset_carries_its_name_and_survives_json(name, tmp_path):
    config = configs.load(name)
    assert config.name == name
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    save(config, tmp_path / "config.json")
    assert load(tmp_path / "config.json") == config


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_steps_of_a_published_run_are_its_tokens(name):
    tokens, first, last, peak_lr = PUBLISHED[name]
    config = configs.load(name)
    schedule = Schedule(config)
    assert abs(schedule.total_tokens - tokens) <= last * config.seq_len
    assert schedule.rows(0) == (0, first)
    assert config.batch_size == last
    assert config.optimizer.peak_lr == peak_lr


@pytest.mark.parametrize("name", [name for name in configs.PRESETS if name not in ("tiny", "small")])
def test_published_settings(name):
    config = configs.load(name)
    optimizer, kimi = config.optimizer, name in ("moonlight", "kimi_k2")
    assert (optimizer.weight_decay, optimizer.clip_norm, optimizer.b1, optimizer.b2) == (0.1, 1.0, 0.9, 0.95)
    assert (optimizer.name, optimizer.momentum) == ("muon" if kimi else "adamw", 0.95)
    v3 = name in ("v3", "r1")
    assert config.data.fim_rate == (0.1 if v3 else 0.0)
    assert config.compute.precision == ("fp8_deepseek" if v3 else "bf16")
    assert optimizer.moments_dtype == ("bfloat16" if v3 else "float32")
    assert (optimizer.ema_decay is not None, optimizer.ema_on) == ((True, "host") if v3 else (False, "device"))
    assert config.balance.sequence == (1e-4 if v3 else 0)


def test_moe_16b_runs_its_published_106449_steps():
    assert configs.load("moe_16b").steps == 106_449


def test_r1_is_v3_under_another_name():
    assert replace(configs.load("r1"), name="v3") == configs.load("v3")


def test_an_unknown_preset_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match=r"^tinny: no such preset; the nearest is tiny$"):
        configs.load("tinny")
    assert configs.load("v2-lite").name == "v2_lite"


def test_small_has_about_a_hundred_million_parameters():
    assert 90e6 < parameters(configs.load("small").model).total < 110e6


@pytest.mark.parametrize(
    ("name", "n", "k", "tolerance"), [("tiny", 16, 4, 0.01), ("small", 32, 4, 0.01), ("moonlight", 64, 6, 0.002)]
)
def test_routed_scaling_factor_follows_moonlights_recipe(name, n, k, tolerance):
    scores = 1 / (1 + np.exp(-np.random.default_rng(0).normal(size=(20_000, n))))
    top = np.sort(scores, axis=1)[:, -k:]
    weights = top / top.sum(axis=1, keepdims=True)
    recipe = np.mean(1 / np.sqrt((weights**2).sum(axis=1)))
    assert configs.load(name).model.routed_scaling_factor == pytest.approx(recipe, abs=tolerance)


def test_v3s_phases_are_the_published_ones():
    pretrain, first, second = (configs.load("v3", phase) for phase in configs.phases("v3"))
    assert pretrain.model.rope_scaling is None and softmax_scale(pretrain.model) == pytest.approx(192**-0.5)
    assert (pretrain.seq_len, pretrain.model.max_position_embeddings, pretrain.name) == (4096, 4096, "v3")
    assert replace(pretrain, model=configs.load("v3").model) == configs.load("v3")  # as pre-training, but for YaRN
    for phase, length, rows in ((first, 32_768, 1920), (second, 131_072, 480)):
        assert (phase.steps, phase.seq_len, phase.batch_size) == (1000, length, rows)
        assert phase.model == configs.load("v3").model  # YaRN s=40, as released
        assert softmax_scale(phase.model) == pytest.approx(0.135234, abs=1e-6)  # the factor is the whole logit's
        schedule = Schedule(phase)
        assert schedule.rows(0) == (0, rows) and rows * length == 62_914_560
        assert {schedule.at(step).learning_rate for step in (0, 500, 999)} == {7.3e-6}
        assert {(schedule.at(s).mtp_weight, schedule.at(s).bias_update_speed) for s in (0, 999)} == {(0.1, 0.0)}
    assert [configs.before("v3", phase) for phase in configs.phases("v3")] == [None, "v3", "v3-32k"]


def test_v2s_phase_is_the_published_one():
    phase = configs.load("v2", "32k")
    assert (phase.name, phase.steps, phase.seq_len, phase.batch_size) == ("v2-32k", 1000, 32_768, 576)
    assert softmax_scale(phase.model) == pytest.approx(0.114721, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "phase", "message"),
    [
        ("v3", "64k", "--phase=64k: no phase of v3; it has pretrain, 32k, 128k"),
        ("v2", "128k", "--phase=128k: no phase of v2; it has pretrain, 32k"),
        ("moonlight", "32k", "--phase: no phases of moonlight were published; v2 and v3 have them"),
    ],
)
def test_an_unknown_phase_is_answered_with_the_known_ones(name, phase, message):
    with pytest.raises(ConfigError) as error:
        configs.load(name, phase)
    assert str(error.value) == message
