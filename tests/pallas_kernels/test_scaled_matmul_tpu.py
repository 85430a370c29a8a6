"""The TPU kernels of FP8 products, run as plain JAX with tiles so small that groups meet in them everywhere."""

import functools
import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.pallas import tpu as pltpu

import configs
from pallas_kernels import grouped_matmul_tpu
from pallas_kernels import scaled_matmul_tpu as kernels
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_matmul_tpu import Tiles
from pallas_kernels.quantise import Tile, dequantise, quantise
from pallas_kernels.scaled_matmul import scaled_gradient, scaled_matmul
from pallas_kernels.scaled_matmul_tpu import Chip, pallas_gradient, pallas_matmul

M, K, N, E = 168, 160, 176, 4  # no tile below divides any
GROUPS = {"some": [40, 0, 65, 30], "one": [0, 168, 0, 0], "none": [0, 0, 0, 0], "all": [1, 95, 39, 33]}
MODES = {"multiplies": Chip(1, True), "converts": Chip(None, True), "converts by bits": Chip(None, False)}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(grouped_matmul_tpu, "EDGE", 32)
    monkeypatch.setattr(grouped_matmul_tpu, "STRIP", 1)
    monkeypatch.setattr(kernels, "_CHUNK", 32)


def draw(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape) * 10 ** rng.uniform(-2, 1, shape), jnp.float32)


@functools.partial(jax.jit, static_argnames=("transposed", "dtype", "chip", "interpret"))
def matmul(x, w, sizes, transposed, dtype, chip, interpret=True):
    return pallas_matmul(x, w, sizes, transposed, dtype, chip=chip, tiles=Tiles(64, 128), interpret=interpret)


@functools.partial(jax.jit, static_argnames=("dtype", "chip", "interpret"))
def gradient(x, dy, sizes, dtype, chip, interpret=True):
    return pallas_gradient(x, dy, sizes, dtype, chip=chip, tiles=Tiles(64, 128, 128), interpret=interpret)


@functools.partial(jax.jit, static_argnames=("transposed", "emulated"))
def matmul_defined(x, w, sizes, transposed, emulated):
    if emulated:
        return scaled_matmul(x, w, sizes, transposed=transposed, dtype=jnp.float32, implementation="emulated")
    x, w = rounded(x), rounded(w)
    return grouped_matmul(x, w.swapaxes(1, 2) if transposed else w, sizes, implementation="tiles")


@functools.partial(jax.jit, static_argnames="emulated")
def gradient_defined(x, dy, sizes, emulated):
    if emulated:
        return scaled_gradient(x, dy, sizes, implementation="emulated")
    x, dy = rounded(x), rounded(dy)
    weights = jnp.zeros((E, K, N))
    return jax.vjp(lambda w: grouped_matmul(x, w, sizes, implementation="tiles"), weights)[1](dy)[0]


def rounded(a):
    """What "dequantised" multiplies."""
    return dequantise(a, jnp.bfloat16).astype(jnp.float32)


def assert_close(got, wanted, tolerance=1e-6):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * max(np.abs(wanted).max(initial=0), 1e-9))


def operands(rows: Tile, weights: Tile, transposed):
    w = quantise(draw(E, N, K, seed=1), weights._replace(rows=weights.columns, columns=weights.rows))
    return quantise(draw(M, K), rows), w if transposed else quantise(draw(E, K, N, seed=1), weights)


def sizes_of(groups):
    return jnp.asarray(GROUPS[groups], jnp.int32)


@pytest.mark.parametrize(
    ("mode", "transposed", "tiles"),
    [
        ("multiplies", False, (Tile(1, 64), Tile(64, 128))),
        ("multiplies", True, (Tile(1, 96), Tile(96, 1))),
        ("multiplies", False, (Tile(None, None), Tile(None, None))),
        ("converts", True, (Tile(64, 32, True), Tile(32, 32, True))),
        ("converts", False, (Tile(1, 96), Tile(96, 1))),
        ("converts by bits", True, (Tile(1, 64), Tile(64, 128))),
        ("converts by bits", False, (Tile(None, None), Tile(None, None))),
    ],
)
def test_rows_times_weights(mode, transposed, tiles):
    x, w = operands(*tiles, transposed)
    for sizes in GROUPS.values():
        sizes = jnp.asarray(sizes, jnp.int32)
        got = matmul(x, w, sizes, transposed, jnp.float32, MODES[mode])
        assert_close(got, matmul_defined(x, w, sizes, transposed, mode == "multiplies"))


@pytest.mark.parametrize(
    ("mode", "tiles"),
    [
        ("multiplies", (Tile(32, 1), Tile(32, 1))),
        ("multiplies", (Tile(128, 1, True), Tile(128, 1, True))),  # longer than the kernel's tile
        ("multiplies", (Tile(None, None), Tile(None, None))),
        ("converts", (Tile(64, 1), Tile(64, 64))),
        ("converts by bits", (Tile(32, 1), Tile(32, 1))),
        ("converts by bits", (Tile(128, 1), Tile(128, 1))),
    ],
)
def test_rows_times_rows(mode, tiles):
    x, dy = quantise(draw(M, K), tiles[0]), quantise(draw(M, N, seed=1), tiles[1])
    for sizes in GROUPS.values():
        sizes = jnp.asarray(sizes, jnp.int32)
        got = gradient(x, dy, sizes, jnp.float32, MODES[mode])
        assert_close(got, gradient_defined(x, dy, sizes, mode == "multiplies"))


@pytest.mark.parametrize("mode", ["multiplies", "converts by bits"])
def test_dense_is_one_group_and_bfloat16_is_rounded_once(mode):
    chip = MODES[mode]
    x, w = operands(Tile(1, 64), Tile(64, 128), False)
    rows, first = jnp.asarray([M, 0, 0, 0], jnp.int32), jax.tree.map(lambda a: a[0], w)
    got = matmul(x, first, None, False, jnp.bfloat16, chip)
    assert got.dtype == jnp.bfloat16
    assert_close(got, matmul_defined(x, w, rows, False, mode == "multiplies"), 2**-8)
    x, dy = quantise(draw(M, K), Tile(32, 1)), quantise(draw(M, N, seed=1), Tile(32, 1))
    got = gradient(x, dy, None, jnp.bfloat16, chip)
    assert got.dtype == jnp.bfloat16 and got.shape == (K, N)
    assert_close(got, gradient_defined(x, dy, rows, mode == "multiplies")[0], 2**-8)


@pytest.mark.parametrize("mode", ["multiplies", "converts by bits"])
def test_the_nan_of_rows_in_no_group_stays_there_and_no_race_is_found(mode):
    """In groups, NaN is what comes of NaN."""
    chip, sizes = MODES[mode], jnp.asarray(GROUPS["some"], jnp.int32)
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    x, w = operands(Tile(1, 64), Tile(64, 128), False)
    spoilt = replace(x, values=x.values.at[135:].set(jnp.nan).at[50, 3].set(jnp.nan))
    got = np.array(matmul(spoilt, w, sizes, False, jnp.float32, chip, interpret))
    wanted = np.array(matmul_defined(x, w, sizes, False, mode == "multiplies"))
    assert np.isnan(got[50]).all() and not got[135:].any()
    got[50], wanted[50] = 0, 0
    assert_close(got, wanted)
    x, dy = quantise(draw(M, K), Tile(32, 1)), quantise(draw(M, N, seed=1), Tile(32, 1))
    spoilt = replace(x, values=x.values.at[135:].set(jnp.nan).at[50, 3].set(jnp.nan))
    got = np.array(gradient(spoilt, dy, sizes, jnp.float32, chip, interpret))
    wanted = np.array(gradient_defined(x, dy, sizes, mode == "multiplies"))
    assert np.isnan(got[2, 3]).all()
    got[2, 3], wanted[2, 3] = 0, 0
    assert_close(got, wanted)


def test_every_value_of_e4m3_is_read_by_bits_as_it_is():
    every = jnp.arange(256, dtype=jnp.uint8).reshape(32, 8)
    values = lax.bitcast_convert_type(every, jnp.float8_e4m3fn)
    np.testing.assert_array_equal(
        jax.jit(kernels._float32, static_argnums=1)(values, False) * kernels._UNIT,
        np.asarray(values.astype(jnp.float32)),
    )


@pytest.mark.parametrize("preset", ["tiny", "v2_lite", "v3", "moe_16b"])
def test_tiles_of_every_preset_fit_the_chip_and_the_scales(preset):
    model = configs.load(preset).model
    d, f = model.hidden_size, model.moe_intermediate_size
    for m, (k, n), native in itertools.product((8, 1000, 16384), ((d, f), (f, d)), (False, True)):
        rows, columns, _ = kernels.choose_tiles(m, k, n, 2, native)
        assert (2 if native else 4) * k * (rows + columns) < 0.8 * grouped_matmul_tpu.VMEM_BYTES
        assert columns % 128 == 0 or columns == n
        for size in (128, 512, m):
            rows, columns, depth = kernels.choose_gradient_tiles(m, k, n, 4, native, size)
            assert 16 * depth * columns < 0.8 * grouped_matmul_tpu.VMEM_BYTES
            assert size >= m or size % rows == 0 or rows % size == 0


def test_what_no_kernel_takes_is_refused():
    x, w = operands(Tile(1, 40), Tile(40, 40), False)
    with pytest.raises(ValueError, match="tiles of 40 values along K=160; expected a multiple of 32"):
        pallas_matmul(x, w, None, False, jnp.float32)
    with pytest.raises(ValueError, match=r"no tile of \[512, 1000000\] x \[1000000, 512\] fits 64 MiB of VMEM"):
        kernels.choose_tiles(512, 1_000_000, 512, 2, True)
