"""The presets: they load, describe the published runs, and go through JSON unchanged."""

import json

import numpy as np
import pytest

import configs
from dsjax.config import ConfigError, from_dict, load, replace, save, to_dict
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
