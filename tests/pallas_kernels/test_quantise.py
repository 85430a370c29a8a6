"""quantise: bit for bit what NumPy makes of the paper's rule, whatever the values."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsjax.hub import fp8
from pallas_kernels import quantise as module
from pallas_kernels.quantise import SMALLEST, Tile, dequantise

R, C = 7, 300  # no multiples of any tile
TILES = [Tile(1, 128), Tile(128, 1), Tile(128, 128), Tile(2, 128, ue8m0=True), Tile(None, None), Tile(512, 1, True)]
compiled = jax.jit(module.quantise, static_argnums=1)


def quantise(x, tile, **options):
    return module.quantise(jnp.asarray(x), tile, **options)


def by_numpy(x, tile):
    """(values, scales), tile by tile."""
    rows, columns = tile.rows or len(x), tile.columns or x.shape[1]
    values = np.zeros(x.shape, ml_dtypes.float8_e4m3fn)
    scales = np.zeros((-(-len(x) // rows), -(-x.shape[1] // columns)), np.float32)
    for i, j in np.ndindex(scales.shape):
        at = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        finite = x[at][np.isfinite(x[at])]
        largest = max(np.abs(finite).max(initial=0), np.float32(SMALLEST))
        scales[i, j] = np.float32(largest) * np.float32(1 / 448)
        if tile.ue8m0:
            scales[i, j] = 2.0 ** np.ceil(np.log2(scales[i, j].astype(np.float64)))
        with np.errstate(invalid="ignore"):
            values[at] = (x[at] * (np.float32(1) / scales[i, j])).astype(ml_dtypes.float8_e4m3fn)
    return values, scales


def assert_same_bits(got, wanted):
    values, scales = wanted
    np.testing.assert_array_equal(np.asarray(got.scales), scales)
    got, wanted = np.asarray(got.values), values
    nan = np.isnan(wanted.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(got.astype(np.float32)), nan)
    np.testing.assert_array_equal(got.view(np.uint8)[~nan], wanted.view(np.uint8)[~nan])


@pytest.mark.parametrize("tile", TILES, ids=str)
@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    spread=st.floats(0, 30),
    places=st.lists(st.tuples(st.integers(0, R - 1), st.integers(0, C - 1)), max_size=4),
    odd=st.sampled_from([0.0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, -3.4e38, 1e-45, 2.0**-100, 448.0]),
)
@example(seed=0, spread=0, places=[], odd=0.0)
def test_values_and_scales_are_bit_for_bit_those_of_numpy(tile, seed, spread, places, odd):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(R, C)) * 10 ** rng.uniform(-spread, min(spread, 8), (R, C))).astype(np.float32)
    for place in places:
        x[place] = odd
    assert_same_bits(compiled(x, tile), by_numpy(x, tile))


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_a_largest_value_becomes_448_and_zeros_stay_zeros(tile):
    x = np.zeros((R, C), np.float32)
    assert not np.asarray(dequantise(quantise(x, tile))).any()
    x[3, 4] = -5.0
    got = quantise(x, tile)
    assert np.asarray(got.values, np.float32)[3, 4] == (-320.0 if tile.ue8m0 else -448.0)  # -5 / 2**-6
    assert np.asarray(dequantise(got))[3, 4] == pytest.approx(-5.0, rel=1e-6)


def test_nan_and_infinity_spoil_no_other_value():
    x = np.random.default_rng(0).normal(size=(R, C)).astype(np.float32)
    spoilt = x.copy()
    spoilt[2, [5, 130, 299]] = np.inf, -np.inf, np.nan
    x[2, [5, 130, 299]] = 0
    got, wanted = (np.asarray(dequantise(quantise(a, Tile(1, 128)))) for a in (spoilt, x))
    assert np.isnan(got[2, [5, 130, 299]]).all()
    np.testing.assert_array_equal(np.nan_to_num(got), wanted)


def test_a_stack_is_quantised_matrix_by_matrix_and_bfloat16_as_what_it_is():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, R, C)), jnp.bfloat16)
    got = quantise(x, Tile(128, 128))
    for i in range(2):
        one = jax.tree.map(lambda a, i=i: a[i], got)
        assert_same_bits(one, by_numpy(np.asarray(x[i], np.float32), Tile(128, 128)))


@pytest.mark.parametrize("ue8m0", [False, True])
def test_blocks_are_those_of_released_checkpoints(ue8m0):
    x = np.random.default_rng(0).normal(size=(200, 300)).astype(np.float32)
    assert_same_bits(quantise(x, Tile(128, 128, ue8m0)), fp8.quantise(x, ue8m0))


@given(tile=st.sampled_from(TILES), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_with_powers_of_two_what_was_quantised_is_quantised_to_itself(tile, seed):
    x = np.random.default_rng(seed).normal(size=(R, C)).astype(np.float32)
    tile = tile._replace(ue8m0=True)
    once = compiled(x, tile)
    again = compiled(np.asarray(dequantise(once)), tile)
    np.testing.assert_array_equal(np.asarray(dequantise(once)), np.asarray(dequantise(again)))


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match=r"implementation='magic': choose one of \['auto', 'reference'"):
        quantise(np.zeros((2, 2), np.float32), Tile(1, 128), implementation="magic")
