"""One row times a matrix, which is what decoding a single token is made of: bound by how fast the matrix is read.

`row_matmul` is the public function and chooses by platform, `reference` its definition.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def row_matmul(x: Float[Array, "1 K"], w: Float[Array, "K N"]) -> Float[Array, "1 N"]:
    """x times w, summed in float32 and returned in float32."""
    return IMPLEMENTATION_BY_PLATFORM.get(jax.default_backend(), reference)(x, w)


def reference(x: Float[Array, "1 K"], w: Float[Array, "K N"]) -> Float[Array, "1 N"]:
    """The definition."""
    return jnp.matmul(x, w, preferred_element_type=jnp.float32)


def halves(x: Float[Array, "1 K"], w: Float[Array, "K N"]) -> Float[Array, "1 N"]:
    """As two products, for the two halves of K: XLA:CPU reads a matrix on one core, and those of a batch on several."""
    if w.shape[0] % 2:
        return reference(x, w)
    pair = x.reshape(2, 1, -1), w.reshape(2, -1, w.shape[1])
    y = jnp.einsum("pbk,pkn->pbn", *pair, preferred_element_type=jnp.float32)
    return y[0] + y[1]


IMPLEMENTATION_BY_PLATFORM = {"cpu": halves}
