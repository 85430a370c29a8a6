"""grouped_matmul: every implementation computes the definition, forward and backward, on every pattern of groups."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from pallas_kernels.grouped_matmul import IMPLEMENTATIONS, grouped_matmul, grouped_swiglu

M, K, N, E = 48, 16, 24, 5  # "tiles" runs 32 rows, then 8 at a time, and 48 rows are no whole number of either
ALL = [name for name in IMPLEMENTATIONS if name != "pallas_tpu"]  # "pallas_interpret" is the same on a CPU
PATTERNS = {
    "balanced": [10, 10, 10, 10, 8],
    "some empty": [0, 17, 0, 31, 0],
    "one huge": [0, 0, 48, 0, 0],
    "one row each": [1, 1, 1, 1, 1],
    "last group ends early": [7, 0, 13, 3, 5],
    "last tile overlaps the last group's own start": [0, 0, 45, 0, 3],
    "no group": [0, 0, 0, 0, 0],
}


def operands(m=M, e=E, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in [(m, K), (e, K, N), (m, N)])


def oracle(x, w, dy, group_sizes):
    """y, dx, dw in float64, one expert at a time."""
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    y, dx, dw = np.zeros((len(x), w.shape[2])), np.zeros_like(x), np.zeros_like(w)
    start = 0
    for e, size in enumerate(group_sizes):
        rows = slice(start, start + size)
        y[rows], dx[rows], dw[e] = x[rows] @ w[e], dy[rows] @ w[e].T, x[rows].T @ dy[rows]
        start += size
    return y, dx, dw


@partial(jax.jit, static_argnames="implementation")
def run(x, w, dy, group_sizes, implementation):
    """y, dx, dw."""
    y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, group_sizes, implementation=implementation), x, w)
    return y, *pull(dy)


def assert_close(actual, expected, tolerance=1e-5):
    """Equal to within tolerance of the largest value."""
    for a, b in zip(actual, expected, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1.0, np.abs(b).max(initial=0)))


@st.composite
def group_sizes_with_room(draw):
    """E sizes with a sum of at most M: where E + 1 cuts fall in M rows."""
    cuts = sorted(draw(st.lists(st.integers(0, M), min_size=E + 1, max_size=E + 1)))
    return [b - a for a, b in itertools.pairwise(cuts)]


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_values_and_gradients_are_those_of_one_matmul_per_expert(implementation, pattern):
    sizes = PATTERNS[pattern]
    args = operands()
    assert_close(run(*args, jnp.array(sizes), implementation), oracle(*args, sizes))


@pytest.mark.parametrize("implementation", ["tiles", "ragged_dot"])
@settings(max_examples=60, deadline=None)
@given(sizes=group_sizes_with_room())
def test_any_groups_agree_with_the_reference(implementation, sizes):
    args = operands()
    expected = run(*args, jnp.array(sizes), "reference")
    assert_close(run(*args, jnp.array(sizes), implementation), expected)
    assert_close(expected, oracle(*args, sizes))


@pytest.mark.parametrize("implementation", ["tiles", "pallas_interpret"])
@pytest.mark.parametrize("m, e", [(0, 3), (1, 1), (1, 8), (4, 32), (33, 32), (300, 2)])
def test_few_rows_and_many_experts(m, e, implementation):
    sizes = np.random.default_rng(1).multinomial(m, [1 / e] * e)
    args = operands(m, e)
    assert_close(run(*args, jnp.array(sizes), implementation), oracle(*args, sizes))


@pytest.mark.parametrize("implementation", ALL)
def test_bf16_sums_in_float32(implementation):
    sizes = PATTERNS["last group ends early"]
    args = operands(dtype=jnp.bfloat16)
    actual = run(*args, jnp.array(sizes), implementation)
    assert all(a.dtype == jnp.bfloat16 for a in actual)
    assert_close(actual, oracle(*args, sizes), tolerance=2**-8)  # one rounding to bf16, at the end


@pytest.mark.parametrize("implementation", ALL)
def test_rows_after_the_last_group_are_zero_and_their_nan_stays_there(implementation):
    sizes = PATTERNS["last group ends early"]
    x, w, dy = operands()
    expected = oracle(x, w, dy, sizes)
    x, dy = x.at[sum(sizes) :].set(jnp.nan), dy.at[sum(sizes) :].set(jnp.nan)
    y, dx, dw = run(x, w, dy, jnp.array(sizes), implementation)
    assert_close((y, dx, dw), expected)
    assert not np.any(y[sum(sizes) :]) and not np.any(dx[sum(sizes) :])


@pytest.mark.parametrize("implementation", ALL)
def test_gradients_are_the_slopes_of_the_values(implementation):
    x, w, _ = operands()
    sizes = jnp.array(PATTERNS["some empty"])
    matmul = jax.jit(partial(grouped_matmul, group_sizes=sizes, implementation=implementation))
    check_grads(matmul, (x, w), order=1, modes=["rev"], rtol=0.01)


@pytest.mark.parametrize("implementation", ["tiles", "ragged_dot"])
def test_same_gradients_inside_shard_map_scan_and_checkpoint(implementation):
    """Three layers that share their groups, each recomputed in the backward pass."""
    rng = np.random.default_rng(2)
    x, w = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in [(M, K), (3, E, K, K)])
    sizes = jnp.array(PATTERNS["last group ends early"])

    def loss(x, w, sizes, implementation):
        def layer(x, w):
            return x + jnp.tanh(grouped_matmul(x, w, sizes, implementation=implementation)), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, w)[0] ** 2)

    mesh = jax.make_mesh((1,), ("expert",), devices=jax.devices()[:1])
    specs = (jax.P(), jax.P(None, "expert"), jax.P("expert"))
    args = [jax.device_put(a, jax.NamedSharding(mesh, spec)) for a, spec in zip((x, w, sizes), specs, strict=True)]
    grad = jax.grad(partial(loss, implementation=implementation), argnums=(0, 1))
    sharded = jax.shard_map(grad, mesh=mesh, in_specs=specs, out_specs=specs[:2], check_vma=False)
    expected = jax.grad(partial(loss, implementation="reference"), argnums=(0, 1))(x, w, sizes)
    assert_close(jax.jit(sharded)(*args), expected)


def test_tiles_keep_no_copy_of_an_operand():
    """Beside the result: one expert's weights and a tile, whatever the number of rows and experts."""
    m, k, n, e = 4096, 128, 64, 32
    x, w, sizes = jnp.ones((m, k)), jnp.ones((e, k, n)), jnp.full(e, m // e)
    compiled = run.lower(x, w, jnp.ones((m, n)), sizes, "tiles").compile()
    assert compiled.memory_analysis().temp_size_in_bytes < min(x.nbytes, w.nbytes)


@partial(jax.jit, static_argnames="implementation")
def run_swiglu(args, dy, group_sizes, implementation):
    """y, and the gradients by x, the rows' weights, w_gate, w_up and w_down."""
    y, pull = jax.vjp(lambda *args: grouped_swiglu(*args, group_sizes, implementation=implementation), *args)
    return y, *pull(dy)


def swiglu_operands(dtype=jnp.float32):
    rng = np.random.default_rng(3)
    shapes = (M, K), (M,), (E, K, N), (E, K, N), (E, N, K)
    x, row_weights, *weights = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    return (x, row_weights.astype(jnp.float32), *weights), jnp.asarray(rng.standard_normal((M, K)), dtype)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 2**-5)])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_swiglu_in_one_walk_is_three_matmuls_and_a_product(pattern, dtype, tolerance):
    args, dy = swiglu_operands(dtype)
    sizes = jnp.array(PATTERNS[pattern])
    actual = run_swiglu(args, dy, sizes, "tiles")
    assert [a.dtype for a in actual] == [dtype, *(a.dtype for a in args)]
    assert_close(actual, run_swiglu(args, dy, sizes, "reference"), tolerance)


def test_swiglu_leaves_the_nan_of_rows_after_the_last_group_where_they_are():
    args, dy = swiglu_operands()
    sizes = PATTERNS["last group ends early"]
    expected = run_swiglu(args, dy, jnp.array(sizes), "reference")
    rest = slice(sum(sizes), None)
    x, row_weights, *weights = args
    args = (x.at[rest].set(jnp.nan), row_weights.at[rest].set(jnp.nan), *weights)
    assert_close(run_swiglu(args, dy.at[rest].set(jnp.nan), jnp.array(sizes), "tiles"), expected)


@pytest.mark.parametrize("implementation", ALL)
def test_checkpoint_can_keep_what_swiglu_multiplies(implementation):
    """Then the backward pass walks the rows once, and does not compute gate and up again."""
    args, dy = swiglu_operands()
    sizes = jnp.array(PATTERNS["balanced"])

    def loss(policy, *args):
        f = jax.checkpoint(partial(grouped_swiglu, group_sizes=sizes, implementation=implementation), policy=policy)
        return jnp.sum(f(*args) * dy)

    saved = jax.checkpoint_policies.save_only_these_names("mlp_gate", "mlp_up")
    kept = [
        shape
        for shape in (a.shape for a in jax.tree.leaves(jax.vjp(partial(loss, saved), *args)[1]))
        if shape == (M, N)
    ]
    assert len(kept) == 2


def test_unknown_implementation_names_the_choices():
    x, w, _ = operands()
    with pytest.raises(ValueError, match=r"'mosaic'.*auto.*tiles.*ragged_dot.*reference"):
        grouped_matmul(x, w, jnp.array(PATTERNS["balanced"]), implementation="mosaic")
