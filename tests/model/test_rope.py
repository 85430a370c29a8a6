"""RoPE against complex multiplication, YaRN against the released models' numbers."""

import jax.numpy as jnp
import models
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import configs
from dsjax.config import RopeScaling, replace
from dsjax.model.rope import apply_rope, inv_freq, rope_tables, softmax_scale

V3 = RopeScaling(factor=40)
GOLDEN = {0: 1, 9: 0.074989421, 10: 0.056234133, 11: 0.039006927, 16: 0.0055, 22: 1.7782794e-4, 23: 3.3338036e-5}


def angles(positions, frequencies):
    return np.asarray(positions, np.float64)[..., None] * frequencies


@given(seed=st.integers(0, 2**32 - 1), start=st.integers(0, 4000))
@settings(max_examples=10, deadline=None)
def test_pairs_turn_as_complex_numbers(seed, start):
    cfg = models.v3()
    positions = start + np.arange(6, dtype=np.int32).reshape(2, 3)
    x = np.random.default_rng(seed).normal(size=(2, 3, 4, cfg.qk_rope_head_dim)).astype(np.float32)
    turn = np.exp(1j * angles(positions, inv_freq(cfg.qk_rope_head_dim, cfg.rope_theta, None)))
    expected = (x[..., 0::2] + 1j * x[..., 1::2]) * turn[:, :, None]
    tables = rope_tables(jnp.asarray(positions), cfg)
    got = np.asarray(apply_rope(jnp.asarray(x), *tables))
    # An angle of thousands of radians in float32 is off by up to 2^-12.
    np.testing.assert_allclose(got[..., 0::2] + 1j * got[..., 1::2], expected, atol=1e-4 if start < 100 else 3e-3)
    shared = np.asarray(apply_rope(jnp.asarray(x[:, :, 0]), *tables))  # one key for all heads
    np.testing.assert_array_equal(shared, got[:, :, 0])


def test_yarn_keeps_fast_frequencies_and_divides_slow_ones():
    frequencies = inv_freq(64, 10_000.0, V3)
    for i, value in GOLDEN.items():
        assert frequencies[i] == pytest.approx(value, rel=1e-7), i
    assert frequencies[31] == pytest.approx(3.3338036e-6, rel=1e-7)
    plain = inv_freq(64, 10_000.0, None)
    moved = np.flatnonzero(frequencies != plain)
    divided = np.flatnonzero(np.isclose(frequencies, plain / 40, rtol=1e-12))
    assert (moved[0] - 1, divided[0]) == (10, 23)  # low, high


def test_kimi_k2_turns_between_pairs_19_and_20():
    model = configs.load("kimi_k2").model
    frequencies = inv_freq(64, model.rope_theta, model.rope_scaling)
    plain = inv_freq(64, model.rope_theta, None)
    np.testing.assert_allclose(frequencies[:20], plain[:20])
    np.testing.assert_allclose(frequencies[20:], plain[20:] / model.rope_scaling.factor)


def test_equal_bounds_of_the_ramp_divide_by_no_zero():
    scaling = RopeScaling(factor=4, original_max_position_embeddings=4, beta_fast=64, beta_slow=64)
    assert np.all(np.isfinite(inv_freq(8, 10_000.0, scaling)))


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("v3", 0.1352337789),
        ("r1", 0.1352337789),
        ("v2", 0.1147213868),
        ("v2_lite", 0.1147213868),
        ("moonlight", 0.0721687836),
    ],
)
def test_the_softmax_scale_carries_yarns_amplitude(name, scale):
    assert softmax_scale(configs.load(name).model) == pytest.approx(scale, abs=5e-11)


def test_the_softmax_scale_of_kimi_k2_and_of_v3_without_yarn():
    assert softmax_scale(configs.load("kimi_k2").model) == pytest.approx(0.130861, abs=5e-7)
    assert softmax_scale(replace(configs.load("v3").model, rope_scaling=None)) == pytest.approx(192**-0.5)


@pytest.mark.parametrize(
    ("mscale", "mscale_all_dim", "amplitude"), [(1.0, 1.0, 1.0), (0.707, 0.707, 1.0), (1.0, 0.0, 1.3688879)]
)
def test_cos_and_sin_carry_the_ratio_of_amplitudes(mscale, mscale_all_dim, amplitude):  # fmt: skip
    cfg = models.v3(rope_scaling=replace(V3, mscale=mscale, mscale_all_dim=mscale_all_dim))
    cos, sin = rope_tables(jnp.arange(5)[None], cfg)
    np.testing.assert_allclose(cos**2 + sin**2, amplitude**2, rtol=1e-6)
    np.testing.assert_allclose(cos[0, 0], amplitude, rtol=1e-6)
