"""A few rows times a matrix, whichever way it is computed."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.row_matmul import IMPLEMENTATION_BY_PLATFORM, halves, reference, row_matmul


@pytest.mark.parametrize("k", [1, 6, 7, 256])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("m", [1, 3])
def test_halves_sum_to_the_definition(m, k, dtype):
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((m, k), (k, 5)))
    expected = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    for function in (halves, reference, row_matmul):
        y = function(x, w)
        assert y.shape == (m, 5) and y.dtype == jnp.float32
        np.testing.assert_allclose(y, expected, atol=1e-4)


def test_a_cpu_takes_the_halves():
    assert IMPLEMENTATION_BY_PLATFORM["cpu"] is halves
