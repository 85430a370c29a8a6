"""Attention on a latent cache by the kernel for Hopper GPUs, interpreted: its definition, no races, and what does its
work where it cannot."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import choice
from pallas_kernels.latent_attention import latent_attention, reference
from pallas_kernels.latent_attention_gpu import choose_splits, pallas_gpu, unsupported

C, R, SCALE = 128, 64, 0.1
interpreted = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="Mosaic GPU's interpreter came with JAX 0.11")


def operands(b, t, h, s, dtype=jnp.bfloat16):
    """q_latent, q_rope, c_kv, k_rope."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in [(b, t, h, C), (b, t, h, R), (b, s, C), (b, s, R)]]


@interpreted
@pytest.mark.parametrize(
    ("t", "h", "s", "splits", "lengths", "races"),
    [
        (1, 4, 128, 1, [128], True),
        # Two tiles of queries, the second not full; a cache that ends within a block; of the second row the first token
        # sees nothing in the last part, and of the first row no token in the first.
        (2, 40, 100, 2, [0, 63], False),
    ],
    ids=["one part", "parts"],
)
def test_values_are_those_of_the_definition_and_no_thread_races(t, h, s, splits, lengths, races):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    args, length = operands(len(lengths), t, h, s), jnp.array(lengths)
    wanted = reference(*(a.astype(jnp.float32) for a in args), length, SCALE)
    written = (jnp.arange(s) < length[:, None] + t)[..., None]
    nan = (*args[:2], *(jnp.where(written, a, jnp.nan) for a in args[2:]))
    ours = functools.partial(pallas_gpu, splits=splits, interpret=plgpu.InterpretGPUParams(detect_races=races))
    got = np.asarray(ours(*nan, length, SCALE), np.float32)
    # bfloat16 rounds the softmax and the output, both by up to 2**-9.
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2**-7 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("items", "blocks", "splits"),
    [(128, 128, 1), (2, 128, 64), (96, 128, 4), (1000, 128, 1), (1, 1, 1)],
)
def test_rows_are_cut_where_multiprocessors_would_be_idle(items, blocks, splits):
    assert choose_splits(items, blocks, 132) == splits


def test_what_the_kernel_cannot_do_is_said_and_done_by_the_definition(caplog):
    choice.warn_once.cache_clear()
    args, length = operands(2, 1, 4, 32, jnp.float32), jnp.array([3, 31])
    with caplog.at_level(logging.WARNING):
        got = [latent_attention(*args, length, SCALE, "pallas_gpu") for _ in range(2)]
    np.testing.assert_array_equal(got[1], reference(*args, length, SCALE))
    assert len(caplog.records) == 1 and "by its definition, not by the kernel for GPUs" in caplog.text
    reason = "needs JAX 0.11 or later" if jax.__version_info__ < (0, 11) else "attends in bfloat16, not float32"
    assert reason in caplog.text
    with pytest.raises(ValueError, match=reason):
        pallas_gpu(*args, length, SCALE)


@interpreted
def test_widths_that_the_kernel_has_no_room_for_are_named():
    q_latent, q_rope, c_kv, k_rope = operands(1, 1, 4, 32)
    assert unsupported(q_latent[..., :96], q_rope, c_kv[..., :96], k_rope) == (
        "C=96 must be one of (128, 256, 384, 512) and R=64 must be 64"
    )
