"""Sums and samples of a checkpoint: one flipped bit shows, on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import P

from dsjax.train.verify import differing, leaf_sums, take_samples, word_sum
from sharding.mesh import make_mesh

DTYPES = [np.float32, jnp.bfloat16, np.int32, jnp.float8_e4m3fn]


@settings(deadline=None)  # the first call compiles
@given(st.sampled_from(DTYPES), st.integers(0, 23), st.integers(0, 31), st.integers(0, 99))
def test_one_flipped_bit_changes_the_sum(dtype, place, bit, seed):
    a = np.random.default_rng(seed).normal(size=24).astype(dtype)
    words = a.view(f"u{a.dtype.itemsize}").copy()
    words[place] ^= words.dtype.type(1 << bit % (8 * a.dtype.itemsize))
    assert int(word_sum(jnp.asarray(a))) != int(word_sum(jnp.asarray(words.view(a.dtype))))


def test_a_sum_is_the_same_on_every_mesh():
    a = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    wanted = leaf_sums({"a": jnp.asarray(a)})
    for sizes in ({"fsdp": 8}, {"data": 2, "expert": 4}):
        mesh = make_mesh(**sizes)
        with jax.set_mesh(mesh):
            laid_out = jax.device_put(a, jax.NamedSharding(mesh, P(("fsdp", "expert"))))
            assert leaf_sums({"a": laid_out}) == wanted == {"a": int(jax.jit(word_sum)(laid_out))}
            assert differing({"a": laid_out}, {"a": wanted["a"] + 1}) == ["a"]
            assert differing({"a": laid_out}, {}) == []  # of a checkpoint from before there were sums


@pytest.mark.parametrize("shape", [(), (5,), (3, 70_000), (300, 300), (7, 1, 3)])
def test_samples_are_what_is_there(shape):
    mesh = make_mesh(jax.devices()[:1])
    with jax.set_mesh(mesh):
        a = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        samples = take_samples({"a": jax.device_put(a, jax.NamedSharding(mesh, P()))}, seed=3)
    index, values = samples["a"]
    np.testing.assert_array_equal(a[index], values)
    assert 0 < values.size <= 1 << 16
