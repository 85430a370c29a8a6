"""A few rows times a matrix, which is what decoding is made of: bound by how fast the matrix is read.

`row_matmul` is the public function and chooses by platform, `reference` its definition.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

FEW = 16  # rows


def row_matmul(x: Float[Array, "M K"], w: Float[Array, "K N"]) -> Float[Array, "M N"]:
    """x times w, summed in float32 and returned in float32."""
    return IMPLEMENTATION_BY_PLATFORM.get(jax.default_backend(), reference)(x, w)


def reference(x: Float[Array, "M K"], w: Float[Array, "K N"]) -> Float[Array, "M N"]:
    """The definition."""
    return jnp.matmul(x, w, preferred_element_type=jnp.float32)


def halves(x: Float[Array, "M K"], w: Float[Array, "K N"]) -> Float[Array, "M N"]:
    """As two products, for the two halves of K.

    XLA:CPU reads the matrix of one row on one core, and those of a batch on several; for a few rows it copies a matrix
    before it reads it, and those of a batch not.
    """
    if w.shape[0] % 2:
        return reference(x, w)
    m, k = x.shape
    pair = jnp.swapaxes(x.reshape(m, 2, k // 2), 0, 1), w.reshape(2, k // 2, -1)
    y = jnp.einsum("pbk,pkn->pbn", *pair, preferred_element_type=jnp.float32)
    return y[0] + y[1]


IMPLEMENTATION_BY_PLATFORM = {"cpu": halves}
