"""Scaled products, dense and grouped: what NumPy computes from the values that E4M3 and scales stand for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantise import Tile, dequantise, quantise
from pallas_kernels.scaled_matmul import scaled_gradient, scaled_matmul

M, K, N, E = 160, 150, 140, 4
GROUPS = {"dense": None, "some": [40, 0, 65, 30], "one": [0, 160, 0, 0], "none": [0, 0, 0, 0], "all": [1, 127, 31, 1]}
WEIGHTS = {"128x128": Tile(128, 128), "128 of a column": Tile(128, 1), "powers of two": Tile(128, 128, True)}
TOLERANCE = {"emulated": 1e-6, "dequantised": 1e-2}  # of the largest value; E4M3 times a scale is rounded to bfloat16


def draw(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape) * 10 ** rng.uniform(-1, 1, shape), jnp.float32)


def exact(a):
    return np.asarray(dequantise(a), np.float64)


def rows_of(group_sizes):
    """(expert, its rows)."""
    stops = np.cumsum(group_sizes)
    return [(e, slice(stop - size, stop)) for e, (size, stop) in enumerate(zip(group_sizes, stops))]


def assert_close(got, wanted, implementation):
    atol = TOLERANCE[implementation] * max(np.abs(wanted).max(initial=0), 1e-9)
    np.testing.assert_allclose(np.asarray(got, np.float64), wanted, rtol=0, atol=atol)


@functools.partial(jax.jit, static_argnames=("transposed", "implementation"))
def matmul(x, w, group_sizes, transposed, implementation):
    return scaled_matmul(x, w, group_sizes, transposed=transposed, dtype=jnp.float32, implementation=implementation)


@functools.partial(jax.jit, static_argnames="implementation")
def gradient(x, dy, group_sizes, implementation):
    return scaled_gradient(x, dy, group_sizes, implementation=implementation)


@pytest.mark.parametrize("implementation", TOLERANCE)
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_rows_times_weights(weights, transposed, implementation):
    tile = WEIGHTS[weights]
    tile = tile._replace(rows=tile.columns, columns=tile.rows) if transposed else tile
    x = quantise(draw(M, K), Tile(1, 128, tile.ue8m0))
    for sizes in GROUPS.values():
        w = draw(E, N, K, seed=1) if transposed else draw(E, K, N, seed=1)
        w = quantise(w[0] if sizes is None else w, tile)
        got = matmul(x, w, None if sizes is None else jnp.asarray(sizes), transposed, implementation)
        matrices = exact(w).swapaxes(-1, -2) if transposed else exact(w)
        wanted = exact(x) @ matrices if sizes is None else np.zeros((M, N))
        for e, rows in rows_of(sizes or []):
            wanted[rows] = exact(x)[rows] @ matrices[e]
        assert_close(got, wanted, implementation)


@pytest.mark.parametrize("implementation", TOLERANCE)
@pytest.mark.parametrize(
    "tiles", [(Tile(128, 1), Tile(128, 1)), (Tile(128, 1), Tile(128, 128)), (Tile(None, None),) * 2]
)
def test_rows_times_rows(tiles, implementation):
    x, dy = quantise(draw(M, K), tiles[0]), quantise(draw(M, N, seed=1), tiles[1])
    for sizes in GROUPS.values():
        got = gradient(x, dy, None if sizes is None else jnp.asarray(sizes), implementation)
        wanted = exact(x).T @ exact(dy) if sizes is None else np.zeros((E, K, N))
        for e, rows in rows_of(sizes or []):
            wanted[e] = exact(x)[rows].T @ exact(dy)[rows]
        assert_close(got, wanted, implementation)


@pytest.mark.parametrize("implementation", TOLERANCE)
def test_rows_in_no_group_are_zeros_whatever_they_hold(implementation):
    sizes, x = jnp.asarray([40, 0, 65, 30]), draw(M, K).at[135:].set(np.nan)
    rows = matmul(quantise(x, Tile(1, 128)), quantise(draw(E, K, N), Tile(128, 128)), sizes, False, implementation)
    assert not np.asarray(rows)[135:].any()
    dw = gradient(quantise(x, Tile(128, 1)), quantise(draw(M, N), Tile(128, 1)), sizes, implementation)
    assert np.isfinite(np.asarray(dw)).all()


def test_blocks_are_summed_in_order_each_scaled_in_float32():
    """The definition, once more: what a kernel must do, operation by operation."""
    x, w = quantise(draw(8, 300), Tile(1, 128)), quantise(draw(300, 130, seed=1), Tile(128, 128))
    total = np.zeros((8, 130), np.float32)
    for b in range(3):
        at = np.s_[128 * b : 128 * (b + 1)]
        product = np.asarray(x.values, np.float32)[:, at] @ np.asarray(w.values, np.float32)[at]
        scale = np.asarray(x.scales)[:, b, None] * np.repeat(np.asarray(w.scales)[b], 128)[:130]
        total = total + product * scale
    got = matmul(x, w, None, False, "emulated")
    np.testing.assert_allclose(np.asarray(got), total, rtol=2e-6, atol=1e-7 * np.abs(total).max())


def test_what_does_not_fit_is_refused():
    x, w = quantise(draw(8, 256), Tile(1, 128)), quantise(draw(256, 8), Tile(64, 64))
    with pytest.raises(ValueError, match="tiles of 128 and 64 values along K; expected as many"):
        scaled_matmul(x, w)
    with pytest.raises(ValueError, match="tiles of 1 and 64 rows; expected as many"):
        scaled_gradient(x, w)
    with pytest.raises(ValueError, match=r"implementation='magic': choose one of \['auto', 'emulated'"):
        scaled_matmul(x, x, implementation="magic", transposed=True)
