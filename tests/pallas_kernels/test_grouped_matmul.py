"""grouped_matmul: every implementation computes the definition, forward and backward, on every pattern of groups."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import grouped_matmul

M, K, N, E = 48, 16, 24, 5
FAST = ["tiles", "ragged_dot"]
PATTERNS = {
    "balanced": [10, 10, 10, 10, 8],
    "some empty": [0, 17, 0, 31, 0],
    "one huge": [0, 0, 48, 0, 0],
    "one row each": [1, 1, 1, 1, 1],
    "last group ends early": [7, 0, 13, 3, 5],
    "no group": [0, 0, 0, 0, 0],
}


def operands(dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    x, w, dy = (rng.standard_normal(shape) for shape in [(M, K), (E, K, N), (M, N)])
    return tuple(jnp.asarray(a, dtype) for a in (x, w, dy))


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
    y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, group_sizes, implementation=implementation), x, w)
    return y, *pull(dy)


def assert_close(actual, expected, tolerance):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("implementation", [*FAST, "reference"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_values_and_gradients_are_those_of_one_matmul_per_expert(implementation, pattern):
    sizes = PATTERNS[pattern]
    args = operands()
    assert_close(run(*args, jnp.array(sizes), implementation), oracle(*args, sizes), 1e-4)
