"""From logits to a token: temperature and top-p, on the device."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


def sample(
    logits: Float[Array, "B V"], key: PRNGKeyArray, temperature: Float[Array, ""], top_p: Float[Array, ""]
) -> Int[Array, "B"]:
    """One token a row; temperature 0 takes the likeliest.

    top_p keeps the smallest set of likeliest tokens whose probability reaches it, never fewer than one.
    """
    warm = logits / jnp.maximum(temperature, 1e-6)
    ordered = jnp.sort(jax.nn.softmax(warm, axis=-1), axis=-1, descending=True)
    before = jnp.cumsum(ordered, axis=-1) - ordered
    floor = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    kept = jnp.where(jax.nn.softmax(warm, axis=-1) >= floor, warm, -jnp.inf)
    drawn = jax.random.categorical(key, kept, axis=-1)
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1)).astype(jnp.int32)
