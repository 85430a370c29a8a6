"""Rotary positions in the released weights' layout (interleaved pairs), and YaRN (reference sections 1.3 and 2.2)."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsjax.config import ModelConfig, RopeScaling


def inv_freq(dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Rotation a position of each of the dim/2 pairs, in radians, float64."""
    f = theta ** (-np.arange(0, dim, 2) / dim)
    if scaling is None:
        return f

    def correction(rotations: float) -> float:
        return (
            dim * math.log(scaling.original_max_position_embeddings / (2 * math.pi * rotations)) / (2 * math.log(theta))
        )

    low = max(math.floor(correction(scaling.beta_fast)), 0)
    high = min(math.ceil(correction(scaling.beta_slow)), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / ((high - low) or 0.001), 0, 1)
    return f * (1 - ramp) + f / scaling.factor * ramp


def _amplitude(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(cfg: ModelConfig) -> float:
    """(nope + rope)^(-1/2), times YaRN's amplitude squared: it corrects the whole logit, not the rotated part alone."""
    scale = cfg.qk_head_dim**-0.5
    if cfg.rope_scaling is not None:
        scale *= _amplitude(cfg.rope_scaling.factor, cfg.rope_scaling.mscale_all_dim) ** 2
    return scale


def rope_tables(positions: Int[Array, "B T"], cfg: ModelConfig) -> tuple[Float[Array, "B T R"], Float[Array, "B T R"]]:
    """cos and sin of every position and pair, float32 (R = qk_rope_head_dim / 2)."""
    # float32: bf16 cannot tell position 257 from 256
    freq = jnp.asarray(inv_freq(cfg.qk_rope_head_dim, cfg.rope_theta, cfg.rope_scaling), jnp.float32)
    angle = positions.astype(jnp.float32)[..., None] * freq
    amplitude = 1.0
    if (s := cfg.rope_scaling) is not None:
        amplitude = _amplitude(s.factor, s.mscale) / _amplitude(s.factor, s.mscale_all_dim)
    return jnp.cos(angle) * amplitude, jnp.sin(angle) * amplitude


def apply_rope(
    x: Float[Array, "B T *H W"], cos: Float[Array, "B T R"], sin: Float[Array, "B T R"]
) -> Float[Array, "B T *H W"]:
    """x with its pairs (x0, x1), (x2, x3), ... rotated; computed in float32, returned in x's dtype."""
    if x.ndim == 4:
        cos, sin = cos[:, :, None], sin[:, :, None]
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    out = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return out.reshape(x.shape).astype(x.dtype)
