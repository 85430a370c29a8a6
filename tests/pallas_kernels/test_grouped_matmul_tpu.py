"""The TPU kernels of the grouped matmul, run as plain JAX with tiles so small that groups meet in them everywhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

import configs
from pallas_kernels import grouped_matmul_tpu as kernels
from pallas_kernels.grouped_matmul import _weighted_swiglu, grouped_swiglu, reference
from pallas_kernels.grouped_matmul_tpu import Tiles, pallas_tpu
from pallas_kernels.grouped_swiglu_tpu import pallas_swiglu

M, K, N, E = 56, 24, 160, 5  # no tile below divides any but K
TILES = Tiles(16, 128), Tiles(32, 16), Tiles(16, 128, 16)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(kernels, "EDGE", 8)
    monkeypatch.setattr(kernels, "STRIP", 1)


def operands(dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in [(M, K), (E, K, N), (M, N)])


@functools.partial(jax.jit, static_argnames=("matmul", "interpret"))
def run(x, w, dy, group_sizes, matmul, interpret=True):
    """y, dx, dw."""
    options = {"tiles": TILES, "interpret": interpret} if matmul is pallas_tpu else {}
    y, pull = jax.vjp(lambda x, w: matmul(x, w, group_sizes, **options), x, w)
    return y, *pull(dy)


def assert_same(actual, expected, tolerance=1e-5):
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1.0, np.abs(b).max()))


@st.composite
def any_groups(draw):
    cuts = sorted(draw(st.lists(st.integers(0, M), min_size=E, max_size=E)))
    return np.diff([0, *cuts]).tolist()


@settings(max_examples=40, deadline=None)
@given(sizes=any_groups())
def test_any_groups_agree_with_the_definition(sizes):
    args, sizes = operands(), jnp.array(sizes)
    assert_same(run(*args, sizes, pallas_tpu), run(*args, sizes, reference))


def test_bf16_sums_in_float32():
    args, sizes = operands(jnp.bfloat16), jnp.array([3, 0, 30, 9, 1])
    expected = run(*(a.astype(jnp.float32) for a in args), sizes, reference)
    actual = run(*args, sizes, pallas_tpu)
    assert_same(actual, [a.astype(jnp.bfloat16) for a in expected], 2**-8)


def test_the_nan_of_rows_in_no_group_stays_there():
    (x, w, dy), sizes = operands(), jnp.array([3, 0, 30, 9, 1])
    expected = run(x, w, dy, sizes, reference)
    nan = (a.at[43:].set(jnp.nan) for a in (x, dy))
    actual = run(next(nan), w, next(nan), sizes, pallas_tpu)
    assert_same(actual, expected)
    assert not np.any(actual[0][43:]) and not np.any(actual[1][43:])


def test_no_races_on_two_cores(capfd):
    args, sizes = operands(), jnp.array([3, 0, 30, 9, 1])
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2)
    assert_same(run(*args, sizes, pallas_tpu, interpret), run(*args, sizes, reference))
    assert "RACE DETECTED" not in capfd.readouterr().out  # the detector only prints


def swiglu_operands(dtype=jnp.float32):
    rng = np.random.default_rng(1)
    shapes = (M, K), (E, K, N), (E, K, N), (E, N, K), (M, K)
    x, *weights, dy = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    return x, jnp.asarray(rng.random(M), jnp.float32), *weights, dy


@functools.partial(jax.jit, static_argnames=("name", "interpret", "grad"))
def run_swiglu(operands, group_sizes, name="kernel", interpret=True, grad=True):
    """y, and the gradients by x, the rows' weights and the three weights."""
    *operands, dy = operands

    def f(*operands):
        if name != "kernel":
            return grouped_swiglu(*operands, group_sizes, implementation=name)
        return pallas_swiglu(*operands, group_sizes, _weighted_swiglu, tiles=Tiles(16, 128), interpret=interpret)

    if not grad:
        return f(*operands)
    y, pull = jax.vjp(f, *operands)
    return y, *pull(dy)


@settings(max_examples=10, deadline=None)
@given(sizes=any_groups())
def test_swiglu_of_any_groups_agrees_with_the_definition(sizes):
    args, sizes = swiglu_operands(), jnp.array(sizes)
    expected = run_swiglu(args, sizes, "reference")
    assert_same(run_swiglu(args, sizes), expected, 1e-4)
    assert_same([run_swiglu(args, sizes, grad=False)], expected[:1], 1e-4)  # gate and up are not written


def test_swiglu_leaves_the_nan_of_rows_in_no_group_there():
    (x, row_weights, *weights, dy), sizes = swiglu_operands(jnp.bfloat16), jnp.array([3, 0, 30, 9, 1])
    expected = run_swiglu((x, row_weights, *weights, dy), sizes, "reference")
    x, row_weights, dy = (a.at[43:].set(jnp.nan) for a in (x, row_weights, dy))
    assert_same(run_swiglu((x, row_weights, *weights, dy), sizes), expected, 2**-5)


def test_swiglu_without_races_on_two_cores(capfd):
    args, sizes = swiglu_operands(), jnp.array([3, 0, 30, 9, 1])
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2)
    expected = run_swiglu(args, sizes, "reference", grad=False)
    assert_same([run_swiglu(args, sizes, interpret=interpret, grad=False)], [expected], 1e-4)
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.parametrize("shape", [(0, K, N), (M, 0, N), (M, K, 0)])
def test_nothing_to_multiply(shape):
    m, k, n = shape
    y = pallas_tpu(jnp.ones((m, k)), jnp.ones((E, k, n)), jnp.zeros(E, jnp.int32), interpret=True)
    assert y.shape == (m, n) and not np.any(y)


@settings(max_examples=60, deadline=None)
@given(sizes=any_groups(), empty=st.booleans())
def test_a_walk_visits_each_tile_of_each_group_once_in_order(sizes, empty):
    rows, walk = 16, jax.tree.map(np.asarray, kernels.walk(jnp.array(sizes), M, 16, empty))
    stops = np.cumsum(sizes)
    expected = []
    for e, (start, stop) in enumerate(zip([*(stops - sizes), stops[-1]], [*stops, M], strict=True)):
        tiles = [(e, t) for t in range(-(-M // rows)) if start < min(stop, (t + 1) * rows) and stop > t * rows]
        if empty:
            tiles = [] if e == E else tiles or [(e, min(start // rows, -(-M // rows) - 1))]
        expected += tiles
    assert list(zip(walk.group[: walk.n_steps], walk.tile[: walk.n_steps])) == expected
    last = max(-(-stops[-1] // rows) - 1, 0)
    assert np.array_equal(walk.read, np.minimum(walk.tile, last))


@pytest.mark.parametrize("preset", ["tiny", "v2_lite", "v2", "v3", "moe_16b"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_of_every_preset_fit_the_chip(preset, itemsize):
    model = configs.load(preset).model
    d, f = model.hidden_size, model.moe_intermediate_size
    for m in (8, 1000, 16384, 1 << 20):
        for k, n in ((d, f), (f, d)):
            rows, columns, _ = kernels.choose_tiles(m, k, n, itemsize)
            assert 2 * itemsize * (rows * k + k * columns + rows * columns) < 0.8 * kernels.VMEM_BYTES
            assert columns % 128 == 0 or columns == n
            rows, columns, depth = kernels.choose_gradient_tiles(m, k, n, itemsize)
            assert 2 * itemsize * (rows * (depth + columns) + depth * columns) < 0.8 * kernels.VMEM_BYTES


def test_rows_too_long_for_the_chip_are_refused():
    with pytest.raises(ValueError, match=r"no tile of \[512, 1000000\] x \[1000000, 512\] fits 64 MiB of VMEM"):
        kernels.choose_tiles(512, 1_000_000, 512, 2)
