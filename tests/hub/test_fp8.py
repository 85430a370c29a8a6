"""The FP8 block format against a plain loop over blocks, and its round trips."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.hub import fp8

sizes = st.tuples(st.integers(1, 300), st.integers(1, 300))


def values_of(seed: int, shape) -> np.ndarray:
    """Any e4m3 bytes but NaN."""
    raw = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
    return np.where(raw & 0x7F == 0x7F, raw - 1, raw).astype(np.uint8).view(fp8.E4M3)


def scales_of(seed: int, shape, ue8m0: bool = False) -> np.ndarray:
    exponent = np.random.default_rng(seed).uniform(-12, 2, fp8.scale_shape(shape))
    return np.exp2(np.round(exponent) if ue8m0 else exponent).astype(np.float32)


def plain(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Reference section 5.3: W[o, i] = float(W8[o, i]) * scale_inv[o // 128, i // 128]."""
    out = np.zeros(values.shape, np.float32)
    for o in range(values.shape[0]):
        for i in range(values.shape[1]):
            out[o, i] = np.float32(values[o, i]) * scale[o // 128, i // 128]
    return out


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (129, 127), (200, 260)])
def test_dequantised_values_are_those_of_the_formula(shape):
    values, scale = values_of(0, shape), scales_of(1, shape)
    np.testing.assert_array_equal(fp8.dequantise(values, scale), plain(values, scale))


@given(sizes, st.integers(0, 999), st.data())
@settings(max_examples=30, deadline=None)
def test_a_part_is_dequantised_as_it_is_in_the_whole(shape, seed, data):
    values, scale = values_of(seed, shape), scales_of(seed, shape)
    start = [data.draw(st.integers(0, n - 1)) for n in shape]
    place = tuple(slice(a, data.draw(st.integers(a + 1, n))) for a, n in zip(start, shape))
    got = fp8.dequantise(values[place], scale[tuple(map(fp8.blocks_of, place))], tuple(start))
    np.testing.assert_array_equal(got, fp8.dequantise(values, scale)[place])


@given(sizes, st.integers(0, 999), st.booleans(), st.sampled_from([np.float32, ml_dtypes.bfloat16]))
@settings(max_examples=60, deadline=None)
def test_weights_that_were_not_trained_get_their_bytes_back(shape, seed, ue8m0, kept_as):
    values, scale = values_of(seed, shape), scales_of(seed, shape, ue8m0)
    weights = fp8.dequantise(values, scale).astype(kept_as)
    again, its_scale = fp8.requantise(weights, scale, ue8m0)
    assert again.tobytes() == values.tobytes()
    assert its_scale.tobytes() == scale.tobytes()


def test_only_trained_blocks_get_new_scales():
    values, scale = values_of(0, (300, 300)), scales_of(0, (300, 300))
    weights = fp8.dequantise(values, scale)
    weights[130, 299] *= 3.0
    again, its_scale = fp8.requantise(weights, scale)
    changed = its_scale != scale
    assert changed.tolist() == [[False] * 3, [False, False, True], [False] * 3]
    np.testing.assert_allclose(fp8.dequantise(again, its_scale), weights, atol=np.abs(weights).max() / 16)


@given(sizes, st.integers(0, 999), st.booleans())
@settings(max_examples=30, deadline=None)
def test_quantising_is_within_half_a_step_of_e4m3(shape, seed, ue8m0):
    weights = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    weights[: shape[0] // 2] = 0  # whole blocks of zeros, and parts of them
    values, scale = fp8.quantise(weights, ue8m0)
    spread = np.kron(scale, np.ones((128, 128), np.float32))[: shape[0], : shape[1]]
    assert np.all(np.abs(fp8.dequantise(values, scale) - weights) <= np.maximum(np.abs(weights) / 15, spread * 2**-9))
    assert np.all(np.isfinite(values.astype(np.float32)))
    if ue8m0:
        assert np.all(np.log2(scale) == np.round(np.log2(scale)))


def test_scales_of_zero_are_no_error():
    values = np.zeros((4, 4), fp8.E4M3)
    scale = np.zeros((1, 1), np.float32)
    again, its_scale = fp8.requantise(fp8.dequantise(values, scale), scale)
    assert again.tobytes() == values.tobytes() and its_scale[0, 0] == 0
