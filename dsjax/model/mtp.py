"""Multi-token prediction: what a module of depth k reads and how it ends (reference section 4).

The block between is a trunk MoE block; embedding and head are the trunk's and come as arguments.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsjax.config import ModelConfig
from dsjax.nn import RMSNorm, linear, param
from dsjax.state import Batch
from pallas_kernels.scaled_linear import Scaling
from sharding.rules import constrain


class MTPInput(nnx.Module):
    """eh_proj([enorm(embedding); hnorm(hidden)]): embedding first, as in the released weights."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        d = cfg.hidden_size
        self.enorm = RMSNorm(d, cfg.rms_norm_eps, rngs=rngs)
        self.hnorm = RMSNorm(d, cfg.rms_norm_eps, rngs=rngs)
        self.eh_proj = param(rngs, (2 * d, d), (None, "embed"), cfg.initializer_range)
        self.out_norm = RMSNorm(d, cfg.rms_norm_eps, rngs=rngs)  # the released shared_head.norm

    def __call__(
        self, embedding: Float[Array, "B T D"], hidden: Float[Array, "B T D"], scaling: Scaling | None = None
    ) -> Float[Array, "B T D"]:
        both = jnp.concatenate([self.enorm(embedding), self.hnorm(hidden)], axis=-1)
        return linear(both, self.eh_proj[...], scaling=scaling)


def shift_left(x: Int[Array, "B T"], n: int) -> Int[Array, "B T"]:
    """Each row moved n places to the left, zeros behind; right across shards of the sequence."""
    whole = constrain(x, "batch", None)
    return constrain(jnp.pad(whole[:, n:], ((0, 0), (0, min(n, x.shape[1])))), "batch", "seq")


def look_ahead(batch: Batch, n: int) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """The token n places on and its document; document 0 where that is another one, or padding."""
    segment_ids = shift_left(batch.segment_ids, n)
    segment_ids = jnp.where(segment_ids == batch.segment_ids, segment_ids, 0)
    return jnp.where(segment_ids > 0, shift_left(batch.tokens, n), 0), segment_ids


def hide(x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """x with zeros where the segment is 0."""
    return x * (segment_ids > 0)[..., None].astype(x.dtype)
