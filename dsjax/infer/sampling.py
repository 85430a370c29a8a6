"""From logits to a token: temperature and top-p, on the device."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sharding.rules import constrain


def sample(
    logits: Float[Array, "B V"], key: PRNGKeyArray, temperature: Float[Array, ""], top_p: Float[Array, ""]
) -> Int[Array, "B"]:
    """One token a row; temperature 0 takes the likeliest.

    top_p keeps the smallest set of likeliest tokens whose probability reaches it, never fewer than one.
    """
    logits = constrain(logits, "batch", None)

    def draw():
        warm = logits / temperature
        p = jax.nn.softmax(warm, axis=-1)
        ordered = jnp.sort(p, axis=-1, descending=True)
        before = jnp.cumsum(ordered, axis=-1) - ordered
        kept = jnp.where((before < top_p) | (before == 0), ordered, jnp.inf)
        floor = jnp.min(kept, axis=-1, keepdims=True)
        return jax.random.categorical(key, jnp.where(p >= floor, warm, -jnp.inf), axis=-1).astype(jnp.int32)

    return jax.lax.cond(temperature > 0, draw, lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32))
