"""The kernel of quantisation for Hopper GPUs, interpreted: bit for bit the definition, no races, and what does its work
where it cannot."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import choice
from pallas_kernels.quantise import Tile, by_gpu_kernel, quantise, reference
from pallas_kernels.quantise_gpu import pallas_gpu, unsupported

interpreted = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="Mosaic GPU's interpreter came with JAX 0.11")


def draw(*shape, dtype=jnp.float32):
    """Values of all sizes, odd ones among them, and a tile without any."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=shape) * 10 ** rng.uniform(-20, 8, shape)).astype(np.float32)
    odd = [0.0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, 1e-45, 2.0**-100, 448.0]
    x.reshape(-1)[rng.choice(x.size, 9 * 20, replace=False)] = odd * 20
    x[..., :128, :128] = 0
    return jnp.asarray(x, dtype)


@interpreted
@pytest.mark.parametrize(
    ("tile", "shape", "dtype", "races"),
    [
        (Tile(1, 128), (200, 160), jnp.bfloat16, True),
        (Tile(128, 1, True), (200, 160), jnp.bfloat16, True),
        (Tile(128, 128, True), (200, 160), jnp.bfloat16, True),
        (Tile(1, 128, True), (2, 72, 160), jnp.float32, False),
        (Tile(128, 128), (2, 72, 160), jnp.float32, False),
    ],
    ids=str,
)
def test_values_and_scales_are_bit_for_bit_the_definition_and_no_thread_races(tile, shape, dtype, races):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    x = draw(*shape, dtype=dtype)
    got, wanted = by_gpu_kernel(x, tile, plgpu.InterpretGPUParams(detect_races=races)), reference(x, tile)
    np.testing.assert_array_equal(got.scales, wanted.scales)
    got, wanted = np.asarray(got.values), np.asarray(wanted.values)
    nan = np.isnan(wanted.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(got.astype(np.float32)), nan)
    np.testing.assert_array_equal(got.view(np.uint8)[~nan], wanted.view(np.uint8)[~nan])


def test_what_the_kernel_cannot_quantise_is_said_and_done_by_the_definition(caplog):
    choice.warn_once.cache_clear()
    x, tile = draw(40, 72), Tile(1, None)
    with caplog.at_level(logging.WARNING):
        got = [quantise(x, tile, implementation="pallas_gpu") for _ in range(2)]
    np.testing.assert_array_equal(got[1].scales, reference(x, tile).scales)
    assert len(caplog.records) == 1 and "by its definition, not by the kernel for GPUs" in caplog.text
    reason = "needs JAX 0.11 or later" if jax.__version_info__ < (0, 11) else r"tiles \(1, None\); expected \(1, 128\),"
    with pytest.raises(ValueError, match=reason):
        pallas_gpu(x, 1, None, lambda largest: largest)


@interpreted
def test_rows_that_cannot_be_copied_are_named():
    expected = "expected multiples of 8 rows and of 32 columns"
    assert unsupported(draw(40, 72), 1, 128) == f"shape (40, 72): {expected}"
    assert unsupported(draw(41, 64), 1, 128) == f"shape (41, 64): {expected}"
