"""Expert load, the balance losses of V1, V2 and V3, and the auxiliary-loss-free bias (reference sections 3.3, 3.4).

Every loss is taken per row (the paper's sequence of T tokens) and summed over rows; the training loss divides by the
number of rows of the whole batch. Counts carry no gradient.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dsjax.config import BalanceConfig, ModelConfig
from dsjax.model.router import one_hot_sum
from dsjax.state import Routing


def expert_load(routing: Routing, valid: Bool[Array, "B T"]) -> Float[Array, "E"]:
    """Tokens routed to each expert, padding left out."""
    return jnp.sum(_selected(routing, valid), axis=(0, 1))


def balance_losses(
    routing: Routing, valid: Bool[Array, "B T"], cfg: ModelConfig, balance: BalanceConfig
) -> dict[str, Float[Array, ""]]:
    """Losses with their factors applied, by name, summed over rows; those of factor 0 are left out."""
    losses = {}
    n, k = cfg.n_routed_experts, cfg.num_experts_per_tok
    tokens = jnp.maximum(jnp.sum(valid, axis=1), 1).astype(jnp.float32)[:, None]  # [B, 1]
    mask = valid[..., None].astype(jnp.float32)
    selected = _selected(routing, valid)
    if balance.sequence:
        # Equation 18 counts the top-k of the scores without the bias, and without groups.
        unbiased = one_hot_sum(jax.lax.top_k(jax.lax.stop_gradient(routing.scores), k)[1], n) * mask
        share = routing.scores / (jnp.sum(routing.scores, axis=-1, keepdims=True) + 1e-20)
        f = jnp.sum(unbiased, axis=1) * n / (k * tokens)
        losses["sequence"] = balance.sequence * jnp.sum(f * jnp.sum(share * mask, axis=1) / tokens)
    if balance.expert or balance.device or balance.communication:
        p = jnp.sum(routing.scores * mask, axis=1) / tokens  # [B, E]
        f = jnp.sum(selected, axis=1) * n / (k * tokens)
        d = balance.n_devices
        p_device = jnp.sum(_by_device(p, d), axis=-1)  # [B, D]
        if balance.expert:
            losses["expert"] = balance.expert * jnp.sum(f * p)
        if balance.device:
            losses["device"] = balance.device * jnp.sum(jnp.mean(_by_device(f, d), axis=-1) * p_device)
        if balance.communication:
            sent = jnp.sum(jnp.max(_by_device(selected, d), axis=-1), axis=1)  # [B, D] tokens that reach a device
            f_sent = sent * d / (cfg.topk_group * tokens)
            losses["communication"] = balance.communication * jnp.sum(f_sent * p_device)
    return losses


def update_bias(
    bias: Float[Array, "L E"], load: Float[Array, "L E"], speed: Float[Array, ""] | float
) -> Float[Array, "L E"]:
    """The bias after a step: up by `speed` for experts below the mean load, down for those above (arXiv:2408.15664)."""
    return bias + speed * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)


def max_violation(load: Float[Array, "L E"]) -> Float[Array, "L"]:
    """MaxVio of each layer: the highest load over the mean load, minus 1."""
    mean = jnp.mean(load, axis=-1)
    return (jnp.max(load, axis=-1) - mean) / jnp.maximum(mean, 1e-9)


def _selected(routing: Routing, valid) -> Float[Array, "B T E"]:
    return one_hot_sum(routing.indices, routing.scores.shape[-1]) * valid[..., None]


def _by_device(x: Float[Array, "*B E"], n_devices: int) -> Float[Array, "*B n E/n"]:
    return x.reshape(*x.shape[:-1], n_devices, -1)
