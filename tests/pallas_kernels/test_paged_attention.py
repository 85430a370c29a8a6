"""Attention on a latent cache in pages: the kernels for TPUs and Hopper GPUs against pages put together, in blocks so
small that rows end in all of them; and what is written into pages."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import choice, latent_attention
from pallas_kernels.paged_attention import (
    choose_part,
    gather,
    paged_attention,
    pallas_gpu,
    pallas_tpu,
    reference,
    unsupported_gpu,
    unsupported_tpu,
    write,
)

B, H, C, R, SCALE = 3, 2, 24, 8, 0.3
L, P, S, N = 2, 7, 8, 5  # layers, pages, entries a page, pages a row
LAYER = jnp.int32(1)
PAGES_AT_ONCE = 2  # the last block is half outside the row's pages
TOLERANCE = {jnp.float32: 4e-6, jnp.bfloat16: 2**-5}


def operands(t, dtype=jnp.float32, b=B):
    """q_latent, q_rope, c_kv, k_rope."""
    rng = np.random.default_rng(0)
    shapes = (b, t, H, C), (b, t, H, R), (L, P, S, C), (L, P, S, R)
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


@functools.partial(jax.jit, static_argnames=("tokens", "interpret"))
def kernel(*args, tokens, interpret=True):
    return pallas_tpu(*args, SCALE, part=(tokens, PAGES_AT_ONCE), interpret=interpret)


@jax.jit
def definition(*args):
    return reference(*args, SCALE)


def assert_same(args, table, lengths, **options):
    """The kernel with NaN where no row may read, against the definition with 0 there."""
    table, lengths, t = np.asarray(table), np.asarray(lengths), args[0].shape[1]
    read = np.zeros((L, P, S), bool)
    for row, length in zip(table, lengths):
        for at in range(length + t):
            read[LAYER, row[at // S], at % S] = True
    nan, zero = ([jnp.where(read[..., None], a, fill) for a in args[2:]] for fill in (jnp.nan, 0))
    places = jnp.asarray(table), jnp.asarray(lengths), LAYER
    actual = kernel(*args[:2], *nan, *places, **{"tokens": t, **options})
    dtype = args[0].dtype.type
    assert actual.dtype == dtype
    exact = (a.astype(jnp.float32) for a in (*args[:2], *zero))
    np.testing.assert_allclose(
        np.asarray(actual, np.float32), definition(*exact, *places), rtol=0, atol=TOLERANCE[dtype]
    )


@settings(max_examples=40, deadline=None)
@given(st.data())
@pytest.mark.parametrize("t", [1, 2, 3, 4])
def test_any_pages_and_lengths_give_what_the_definition_gives(t, data):
    """Rows share pages and have the same page twice."""
    lengths = data.draw(st.lists(st.integers(0, N * S - t), min_size=B, max_size=B))
    row = st.lists(st.integers(0, P - 1), min_size=N, max_size=N)
    assert_same(operands(t), data.draw(st.lists(row, min_size=B, max_size=B)), lengths)


TABLE = np.arange(B * N).reshape(B, N) % P


@pytest.mark.parametrize("lengths", [[0, 0, 0], [7, 8, 15], [16, 31, N * S - 4]])
@pytest.mark.parametrize("tokens", [1, 2])
def test_queries_that_do_not_fit_at_once_read_the_pages_again(lengths, tokens):
    assert_same(operands(4), TABLE, lengths, tokens=tokens)


@pytest.mark.parametrize("t", [1, 3])
def test_bf16_sums_in_float32(t):
    assert_same(operands(t, jnp.bfloat16), TABLE, [0, 21, N * S - t])


@pytest.mark.parametrize("b", [2, 3])
def test_no_races_on_two_cores(b, capfd):
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2)
    assert_same(operands(2, b=b), TABLE[:b], [0, 14, N * S - 2][:b], tokens=1, interpret=interpret)
    assert "RACE DETECTED" not in capfd.readouterr().out  # the detector only prints


@pytest.mark.parametrize("implementation", ["pallas_interpret", "reference"])
def test_the_public_function_goes_by_name(implementation):
    places = jnp.asarray(TABLE), jnp.array([3, 20, 39]), LAYER
    args = *operands(1), *places
    np.testing.assert_allclose(paged_attention(*args, SCALE, implementation), definition(*args), atol=4e-6)


def test_unknown_implementation_is_an_error():
    with pytest.raises(ValueError, match="implementation='mosaic': choose one of"):
        paged_attention(*operands(1), jnp.asarray(TABLE), jnp.zeros(B, jnp.int32), LAYER, SCALE, "mosaic")


def refused(unsupported, b=8, t=1, h=128, c=512, r=64, page=128, n=64):
    """Why a kernel cannot do with arguments of these shapes."""
    shapes = (b, t, h, c), (b, t, h, r), (1, 9, page, c), (1, 9, page, r)
    arguments = (
        *(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes),
        jax.ShapeDtypeStruct((b, n), jnp.int32),
    )
    said = []
    jax.eval_shape(lambda *args: said.append(unsupported(*args)), *arguments)
    return said[0]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"t": 128}, None),
        ({"page": 32}, "page_size=32 must be one of (128, 256, 512, 1024)"),
        ({"c": 64}, "C=64 must be a multiple of 128 and R=64 less"),
        ({"n": 1 << 15}, "a table of 8 x 32768 pages exceeds 512 KiB"),
        ({"h": 1 << 14, "page": 1024}, "16384 queries of width 512 + 64 and a page of 1024 do not fit 64 MiB"),
    ],
)
def test_what_a_tpu_cannot_read_in_place_is_named(changed, reason):
    assert refused(unsupported_tpu, **changed) == reason


@pytest.mark.parametrize(
    ("t", "h", "page", "part"), [(1, 128, 128, (1, 8)), (4, 16, 256, (4, 4)), (128, 128, 128, (32, 2))]
)
def test_as_many_tokens_and_pages_at_once_as_fit(t, h, page, part):
    assert choose_part(t, h, 512, 64, page, 2) == part


def test_what_is_not_read_in_place_is_put_together_and_said(caplog):
    choice.warn_once.cache_clear()
    args = *operands(2), jnp.asarray(TABLE), jnp.array([3, 20, 38]), LAYER
    with caplog.at_level(logging.WARNING):
        got = [paged_attention(*args, SCALE, "pallas_gpu") for _ in range(2)]
    past = gather(args[2], args[4], LAYER), gather(args[3], args[4], LAYER)
    np.testing.assert_array_equal(got[1], latent_attention.reference(*args[:2], *past, args[5], SCALE))
    (first, _) = caplog.records  # the other one is of `latent_attention`
    reason = "needs JAX 0.11 or later" if jax.__version_info__ < (0, 11) else "attends in bfloat16, not float32"
    assert first.message.startswith(f"attention on the latent cache from a copy of its pages, not in place: {reason}")
    with pytest.raises(ValueError, match=reason):
        pallas_gpu(*args, SCALE)


@settings(max_examples=40, deadline=None)
@given(st.data())
@pytest.mark.parametrize("t", [1, 4, 20])
def test_whole_pages_hold_what_rows_written_one_by_one_do(t, data):
    lengths = data.draw(st.lists(st.integers(0, N * S), min_size=2, max_size=2))
    table = 1 + np.arange(2 * N).reshape(2, N)
    table[0, data.draw(st.integers(0, N)) :] = 0  # a row with fewer pages
    rng = np.random.default_rng(0)
    pages, new = rng.standard_normal((L, 1 + 2 * N, S, 3), np.float32), rng.standard_normal((2, t, 3), np.float32)
    both = [_write(pages, new, table, np.array(lengths), LAYER, whole=whole) for whole in (False, True)]
    np.testing.assert_array_equal(*(np.asarray(got)[:, 1:] for got in both))  # page 0 is for what nobody reads


_write = jax.jit(write, static_argnames="whole")


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="Mosaic GPU's interpreter came with JAX 0.11")
@pytest.mark.parametrize(
    ("t", "h", "page", "splits", "lengths", "races"),
    [(1, 4, 128, 1, [130], True), (2, 40, 64, 2, [0, 100], False)],
    ids=["one part", "parts"],
)
def test_a_gpu_reads_pages_of_whole_blocks(t, h, page, splits, lengths, races):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    rng, b, c, r = np.random.default_rng(0), len(lengths), 128, 64
    of = (b, t, h, c), (b, t, h, r), (2, 3, page, c), (2, 3, page, r)
    args = [jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in of]
    table = np.array([[2, 1], [0, 2]])[:b]
    read = np.zeros((2, 3, page, 1), bool)
    for row, length in zip(table, lengths):
        for at in range(length + t):
            read[LAYER, row[at // page], at % page] = True
    places = jnp.asarray(table, jnp.int32), jnp.array(lengths), LAYER
    wanted = reference(*(a.astype(jnp.float32) for a in args), *places, SCALE)
    nan = (*args[:2], *(jnp.where(read, a, jnp.nan) for a in args[2:]))
    ours = functools.partial(pallas_gpu, splits=splits, interpret=plgpu.InterpretGPUParams(detect_races=races))
    got = np.asarray(ours(*nan, *places, SCALE), np.float32)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2**-7 * np.abs(wanted).max())


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="Mosaic GPU came with JAX 0.11")
@pytest.mark.parametrize(("page", "reason"), [(128, None), (32, "page_size=32 must be a multiple of 64")])
def test_what_a_gpu_cannot_read_in_place_is_named(page, reason):
    assert refused(unsupported_gpu, page=page) == reason
