"""softmax(q k^T) v under a causal and document mask, in blocks of queries."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sharding.rules import constrain, spec

_MIN_BLOCK, _MAX_BLOCKS = 128, 8


def attend(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    segment_ids: Int[Array, "B T"],
    scale: float,
) -> Float[Array, "B T H V"]:
    """Attention of every token to those before it in its own segment; softmax in float32.

    Queries may be sharded over `context`; keys and values are whole along the sequence. Scores are recomputed in the
    backward pass, so that no [T, T] array outlives its block.
    """
    heads, whole = spec("batch", "seq", "heads", None), spec("batch", None, "heads", None)
    seq, row = spec("batch", "seq"), spec("batch", None)
    index = constrain(jnp.arange(q.shape[1]), "seq")

    def local(q, k, v, index, q_segments, k_segments):
        t, s = q.shape[1], k.shape[1]
        block = max(_MIN_BLOCK, -(-t // _MAX_BLOCKS))
        out = []
        for start in range(0, t, block):
            rows = slice(start, min(start + block, t))
            seen = slice(0, rows.stop if t == s else s)  # the causal half, where the sequence is not sharded
            out.append(
                _attend_block(
                    q[:, rows], k[:, seen], v[:, seen], index[rows], q_segments[:, rows], k_segments[:, seen], scale
                )
            )
        return jnp.concatenate(out, axis=1)

    return jax.shard_map(
        local, in_specs=(heads, whole, whole, spec("seq"), seq, row), out_specs=heads, check_vma=False
    )(q, k, v, index, constrain(segment_ids, "batch", "seq"), constrain(segment_ids, "batch", None))


@functools.partial(jax.checkpoint, static_argnums=6)
def _attend_block(q, k, v, index, q_segments, k_segments, scale):
    scores = jnp.einsum("bthk,bshk->bhts", q, k, preferred_element_type=jnp.float32) * scale
    causal = index[:, None] >= jnp.arange(k.shape[1])
    same = q_segments[:, :, None] == k_segments[:, None, :]
    p = jax.nn.softmax(jnp.where((causal & same)[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshv->bthv", p.astype(v.dtype), v)
