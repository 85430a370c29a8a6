"""What changes between calls.

Kept apart from the modules: the shape-checking hook and pytree dataclasses do not mix.
"""

from typing import Any

import jax
from flax import struct


@struct.dataclass
class Batch:
    """Packed rows. Segment 0 is padding; positions start at 0 in every document."""

    tokens: jax.Array  # [B, T] int32
    segment_ids: jax.Array  # [B, T] int32, 1, 2, ... within a row
    positions: jax.Array  # [B, T] int32


@struct.dataclass
class Routing:
    """Where a router sends tokens. Replayable: indices can be given instead of chosen."""

    indices: jax.Array  # [B, T, K] int32, chosen experts
    weights: jax.Array  # [B, T, K] float32, their share of the output
    scores: jax.Array  # [B, T, E] float32, before bias and choice


@struct.dataclass
class LatentCache:
    """What MLA keeps of past tokens: one latent per token, shared by all heads."""

    c_kv: jax.Array  # [B, S, kv_lora_rank]
    k_rope: jax.Array  # [B, S, qk_rope_head_dim]


@struct.dataclass
class KVCache:
    """What plain multi-head attention keeps of past tokens."""

    k: jax.Array  # [B, S, H, head_dim]
    v: jax.Array  # [B, S, H, head_dim]


@struct.dataclass
class Cache:
    """Past tokens of all layers: leaves of `dense` and `moe` start with the number of such layers, or are lists."""

    dense: LatentCache | KVCache
    moe: LatentCache | KVCache
    length: jax.Array  # [B] int32, tokens already written


@struct.dataclass
class TrainState:
    """Everything a step changes. The data position is the step: batch = f(seed, step)."""

    step: jax.Array  # [] int32, steps taken, skipped ones included
    model: Any  # DeepSeek
    opt_state: Any  # optax state
    router_bias: Any  # RouterBias
    ema: Any  # DeepSeek of averaged weights, or None
    skipped: jax.Array  # [] int32, steps skipped for NaN or Inf, or as spikes
    skipped_in_a_row: jax.Array  # [] int32
    history: jax.Array  # [2, spike_window] losses and gradient norms of the last steps taken, NaN before the first


@struct.dataclass
class RouterBias:
    """Bias of the choice of experts, moved by load and not by gradient."""

    moe: jax.Array  # [L - first_k_dense_replace, E] float32
    mtp: jax.Array  # [num_nextn_predict_layers, E] float32


@struct.dataclass
class Metrics:
    """What a step says of itself. Losses in nats a token."""

    loss: jax.Array  # [] next-token cross-entropy
    mtp_loss: jax.Array  # [depth]
    balance_loss: jax.Array  # []
    grad_norm: jax.Array  # [] before clipping
    load: RouterBias  # [layers, E] tokens routed to each expert
    max_vio: jax.Array  # [layers + depth] MaxVio of each MoE layer
    overflow: jax.Array  # [] int32, rows and pairs of this step that did not fit the experts' buffers
    skipped: jax.Array  # [] steps skipped so far
    skipped_in_a_row: jax.Array  # []
    spike: jax.Array  # [] bool, loss or gradient norm far above their medians
    medians: jax.Array  # [2] of the loss and the gradient norm, before this step
    leaf_norms: jax.Array  # [leaves] gradient norm of every weight, before clipping
