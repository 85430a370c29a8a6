"""The TPU kernel of quantisation, run as plain JAX: bit for bit the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.quantise import Tile, by_kernel, length, quantise_all, reference
from pallas_kernels.quantise_tpu import takes

R, C = 300, 330  # no multiples of any tile
TILES = [Tile(1, 128), Tile(1, None, True), Tile(128, 1, True), Tile(None, 1), Tile(128, 128), Tile(128, 128, True)]


def draw(*shape, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=shape) * 10 ** rng.uniform(-20, 8, shape)).astype(np.float32)
    odd = [0.0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, 1e-45, 2.0**-100, 448.0]
    x.reshape(-1)[rng.choice(x.size, 9 * 20, replace=False)] = odd * 20
    x[..., :64, :] = 0  # a row without any value, and a tile with few
    return jnp.asarray(x, dtype)


def assert_same_bits(got, wanted):
    assert got.tile == wanted.tile and got.values.dtype == wanted.values.dtype
    np.testing.assert_array_equal(np.asarray(got.scales), np.asarray(wanted.scales))
    got, wanted = np.asarray(got.values), np.asarray(wanted.values)
    nan = np.isnan(wanted.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(got.astype(np.float32)), nan)
    np.testing.assert_array_equal(got.view(np.uint8)[~nan], wanted.view(np.uint8)[~nan])


@functools.partial(jax.jit, static_argnums=(1, 2))
def kernel(x, tile, interpret=True):
    return by_kernel(x, tile, interpret)


defined = jax.jit(reference, static_argnums=1)


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_values_and_scales_are_bit_for_bit_the_definition(tile):
    assert takes(length(tile.rows, R), length(tile.columns, C), (R, C))
    assert_same_bits(kernel(draw(R, C), tile), defined(draw(R, C), tile))


@pytest.mark.parametrize("shape", [(2, R, 1100), (1, 5, 1100), (3, 1, 128)], ids=str)
@pytest.mark.parametrize("tile", [Tile(1, 128), Tile(128, 1), Tile(128, 128)], ids=str)
def test_a_stack_of_bfloat16_matrices(shape, tile):
    x = draw(*shape, dtype=jnp.bfloat16)
    assert_same_bits(kernel(x, tile), defined(x, tile))


def weighted(a, b, of_rows):
    """What comes first itself, and something of all three, in bfloat16 as its definition."""
    return a, (a * jnp.float32(b) * of_rows).astype(a.dtype)


@functools.partial(jax.jit, static_argnums=(3, 4))
def quantised(a, b, of_rows, tile, implementation):
    return quantise_all(weighted, (a, b, of_rows), tile, implementation=implementation)


@pytest.mark.parametrize("tile", [Tile(1, 128), Tile(128, 1, True), Tile(128, 128), Tile(None, None)], ids=str)
def test_several_results_of_several_matrices_in_one_walk(tile):
    a, b, of_rows = draw(R, C, dtype=jnp.bfloat16), draw(R, C)[::-1], jnp.linspace(-1, 1, R)[:, None]
    for got, wanted in zip(*(quantised(a, b, of_rows, tile, name) for name in ("pallas_interpret", "reference"))):
        assert_same_bits(got, wanted)


def test_a_matrix_with_one_scale_and_one_too_wide_are_left_to_the_definition():
    assert not takes(16384, 7168, (16384, 7168))
    assert not takes(1, 128, (8, 1 << 20))
    assert not takes(7, 128, (14, 256))
    assert takes(1, 128, (16384, 18432), 3) and takes(128, 128, (7168, 18432))
    assert takes(512, 1, (16384, 7168)) and not takes(512, 1, (16384, 7168), 16)


@pytest.mark.parametrize("tile", [Tile(1, 128), Tile(128, 1)], ids=str)
def test_no_races(tile):
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    assert_same_bits(kernel(draw(R, C), tile, interpret), defined(draw(R, C), tile))
