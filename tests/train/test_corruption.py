"""The check for silent corruption: quiet on devices that compute, loud for one flipped bit on one of them."""

import jax
import models
import pytest
import runs

from dsjax.train.corruption import CorruptionCheck
from sharding.mesh import make_mesh

CONFIG = models.config(models.v3(num_hidden_layers=2))


@pytest.fixture(scope="module", autouse=True)
def compiled_programs(tmp_path_factory):
    with runs.compiled_once(tmp_path_factory):
        yield


@pytest.fixture(scope="module")
def checked():
    mesh = make_mesh(jax.devices()[:4], fsdp=2, expert=2)
    with jax.set_mesh(mesh):
        state = models.state(CONFIG)
        batch = models.micro_batches(models.pack([[9, 7], [16], [5, 5, 6], [12]]), 1)
        yield CorruptionCheck(CONFIG, mesh), state, batch


def test_healthy_devices_agree_bit_for_bit(checked):
    check, state, batch = checked
    assert check(state, batch, 0.3) == []


@pytest.mark.parametrize("device", [0, 3])
@pytest.mark.parametrize("bit", [0, 22, 30])
def test_a_bit_flipped_on_one_device_is_caught(checked, device, bit):
    check, state, batch = checked
    assert check(state, batch, 0.3, fault=(jax.devices()[device], bit))


def test_the_second_layout_gives_every_part_to_another_device(checked):
    check, state, _ = checked
    for a in jax.tree.leaves(state.model):
        moved = check._move(a)
        assert all(s.device != t.device for s, t in zip(a.addressable_shards, moved.addressable_shards))
        assert [s.index for s in moved.addressable_shards]  # and the whole is the same
    assert (jax.device_get(moved) == jax.device_get(a)).all()
