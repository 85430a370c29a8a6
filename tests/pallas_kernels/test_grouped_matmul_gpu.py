"""The kernels for Hopper GPUs, interpreted: their definitions, no races, and what does their work where they cannot."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pallas_kernels import choice
from pallas_kernels.grouped_matmul import grouped_matmul, reference
from pallas_kernels.grouped_matmul_gpu import ROWS, align, gather, pallas_gpu, tile_experts, unsupported
from pallas_kernels.quantise import Tile, quantise
from pallas_kernels.scaled_matmul import scaled_gradient, scaled_matmul
from pallas_kernels.scaled_matmul_gpu import scaled_gradient_gpu, scaled_matmul_gpu

M, K, N, E = 384, 128, 256, 3
interpreted = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="Mosaic GPU's interpreter came with JAX 0.11")


def draw(*shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def params(races):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.InterpretGPUParams(detect_races=races)


def assert_close(got, wanted, tolerance):
    for g, w in zip(got, wanted, strict=True):
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        np.testing.assert_allclose(g, w, rtol=0, atol=tolerance * np.abs(w).max())


@interpreted
@pytest.mark.parametrize("sizes,alignment", [([128, 0, 128], 128), ([100, 3, 120], 1)], ids=["aligned", "copied"])
def test_values_and_gradients_are_those_of_the_definition_and_no_thread_races(sizes, alignment):
    x, w, dy = (draw(*shape, dtype=jnp.bfloat16) for shape in ((M, K), (E, K, N), (M, N)))
    sizes = jnp.array(sizes)
    x = x.at[256:].set(jnp.nan)  # in no group
    # Races are looked for where nothing but the kernels runs.
    ours = functools.partial(pallas_gpu, alignment=alignment, interpret=params(races=alignment > 1))
    y, pull = jax.vjp(lambda x, w: ours(x, w, sizes), x, w)
    wanted, pull_wanted = jax.vjp(lambda x, w: reference(x, w, sizes), x.astype(jnp.float32), w.astype(jnp.float32))
    assert_close((y, *pull(dy)), (wanted, *pull_wanted(dy.astype(jnp.float32))), 2**-8)


@interpreted
def test_scaled_products_are_those_of_the_definition_and_no_thread_races():
    sizes, races = jnp.array([128, 0, 128]), params(races=True)
    x, w, dy = draw(M, 256), draw(E, 256, 128), draw(M, 128)
    w = quantise(w, Tile(128, 128))
    for rows, transposed in ((x, False), (dy, True)):
        rows = quantise(rows, Tile(1, 128))
        got = scaled_matmul_gpu(rows, w, sizes, transposed, jnp.bfloat16, True, races)
        wanted = scaled_matmul(rows, w, sizes, transposed=transposed, dtype=jnp.float32)
        assert_close([got], [wanted], 2**-8)  # what bfloat16 rounds; before that they differ by the order of sums
    x, dy = (quantise(a, Tile(128, 1)) for a in (x, dy))
    got = scaled_gradient_gpu(x, dy, sizes, jnp.float32, races)
    assert_close([got], [scaled_gradient(x, dy, sizes)], 1e-6)


@interpreted
def test_scaled_products_of_groups_that_begin_anywhere():
    sizes, x, w = jnp.array([100, 3, 120]), quantise(draw(M, 128), Tile(1, 128)), draw(E, 128, 128)
    w = quantise(w, Tile(128, 128, ue8m0=True))
    got = scaled_matmul_gpu(x, w, sizes, False, jnp.bfloat16, False, params(races=False))
    assert_close([got], [scaled_matmul(x, w, sizes, dtype=jnp.float32)], 2**-8)


@interpreted
def test_widths_that_are_no_whole_blocks():
    """576, say: V3's wkv_a."""
    sizes, interpret = jnp.array([128]), params(races=False)
    x, dy, w = draw(128, 72), draw(128, 200), quantise(draw(1, 72, 200), Tile(128, 128))
    for rows, transposed in ((x, False), (dy, True)):
        rows = quantise(rows, Tile(1, 128))
        got = scaled_matmul_gpu(rows, w, sizes, transposed, jnp.bfloat16, True, interpret)
        wanted = scaled_matmul(rows, w, sizes, transposed=transposed, dtype=jnp.float32)
        assert_close([got], [wanted], 2**-8)
    x, dy = (quantise(a, Tile(128, 1)) for a in (x, dy))
    assert_close([scaled_gradient_gpu(x, dy, sizes, jnp.float32, interpret)], [scaled_gradient(x, dy, sizes)], 1e-6)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(0, 300), min_size=1, max_size=5), rest=st.integers(0, 200))
@example(sizes=[0, 0, 0, 0, 0], rest=0)
@example(sizes=[128, 256, 0, 0, 128], rest=0)
def test_aligned_rows_are_the_groups_rows_and_come_back_where_they_were(sizes, rest):
    sizes = np.array(sizes + [0] * (5 - len(sizes)))
    m = 1536  # one shape, one compilation; at least the 5 * 300 rows and what is in no group
    plan = jax.tree.map(np.asarray, compiled_align(jnp.asarray(sizes), m))
    rows = np.arange(1, m + 1)[:, None].astype(np.float32)
    there = np.asarray(gather(jnp.asarray(rows), jnp.asarray(plan.source)))
    assert (plan.sizes % ROWS == 0).all() and len(there) % ROWS == 0
    stops, new_stops = np.cumsum(sizes), np.cumsum(plan.sizes)
    for size, filled, stop, new_stop in zip(sizes, plan.sizes, stops, new_stops):
        own = there[new_stop - filled : new_stop]
        np.testing.assert_array_equal(own[:size], rows[stop - size : stop])
        assert not own[size:].any()
    assert not there[new_stops[-1] :].any()
    back = np.asarray(gather(jnp.asarray(there), jnp.asarray(plan.place)))
    np.testing.assert_array_equal(back[: stops[-1]], rows[: stops[-1]])
    assert not back[stops[-1] :].any()


compiled_align = jax.jit(align, static_argnums=1)


def test_a_tile_is_of_the_expert_whose_rows_it_holds():
    got = tile_experts(jnp.array([256, 0, 128, 0]), 5)
    assert np.asarray(got).tolist() == [0, 0, 2, -1, -1]


def test_what_the_kernels_cannot_do_is_said_and_done_by_tiles(caplog):
    choice.warn_once.cache_clear()
    x, w, sizes = draw(48, 16), draw(5, 16, 24), jnp.array([3, 0, 30, 9, 1])
    with caplog.at_level(logging.WARNING):
        got = [grouped_matmul(x, w, sizes, implementation="pallas_gpu") for _ in range(2)]
    np.testing.assert_allclose(got[0], reference(x, w, sizes), atol=1e-4)
    assert len(caplog.records) == 1 and "by tiles, not by the kernels for GPUs" in caplog.text
    reason = "needs JAX 0.11 or later" if jax.__version_info__ < (0, 11) else "multiplies bfloat16, not float32"
    assert reason in caplog.text
    with pytest.raises(ValueError, match=reason):
        pallas_gpu(x, w, sizes)


@interpreted
def test_widths_that_are_no_multiples_of_128_are_named():
    x, w = draw(128, 192, dtype=jnp.bfloat16), draw(2, 192, 128, dtype=jnp.bfloat16)
    assert unsupported(x, w) == "K=192 and N=128 must be multiples of 128"


def test_fp8_that_the_kernels_cannot_multiply_is_dequantised_and_that_is_said(caplog):
    choice.warn_once.cache_clear()
    x, w = quantise(draw(128, 256), Tile(1, 256)), quantise(draw(256, 128), Tile(256, 1))
    with caplog.at_level(logging.WARNING):
        got = scaled_matmul(x, w, dtype=jnp.float32, implementation="pallas_gpu")
    assert_close([got], [scaled_matmul(x, w, dtype=jnp.float32, implementation="dequantised")], 1e-6)
    assert "FP8 matmul by dequantising, not by the kernels for GPUs" in caplog.text
