"""The whole loop on a toy: it learns, goes on after any end with the same answers, and each option does what it says."""

import jax
import numpy as np
import pytest
import runs
import toys

from dsjax.posttrain import grpo


@pytest.fixture(scope="module", autouse=True)
def compiled_programs(tmp_path_factory):
    with runs.compiled_once(tmp_path_factory):
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return toys.source(tmp_path_factory.mktemp("source") / "micro")


@pytest.fixture
def fast(monkeypatch):
    toys.share(monkeypatch)


def train(source, folder, task=None, **changes):
    return grpo.train(toys.config(source, **changes), folder, source=source, quiet=True, task=task or toys.Low())


def test_the_mean_reward_rises(source, tmp_path, fast):
    train(source, tmp_path / "run", steps=16, eval_every=16, checkpoint_every=16)
    rewards = [row["reward"] for row in toys.rows(tmp_path / "run", "train")]
    print(rewards)
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.2
