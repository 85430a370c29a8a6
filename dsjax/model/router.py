"""Which experts a token goes to: the three routers of DeepSeekMoE, V2 and V3 (reference section 3.2)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsjax.config import ModelConfig
from dsjax.nn import param
from dsjax.state import Routing


class Router(nnx.Module):
    """Scores and choice of experts, in float32."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.weight = param(rngs, (cfg.hidden_size, cfg.n_routed_experts), ("embed", None), cfg.initializer_range)
        self.cfg = cfg

    def __call__(
        self,
        x: Float[Array, "B T D"],
        bias: Float[Array, "E"],
        indices: Int[Array, "B T K"] | None = None,
        dtype: str = "float32",
    ) -> Routing:
        """Routing of every token; with `indices` given, those are replayed and only their weights are computed.

        Where the first of a token's indices is negative, its experts are chosen. dtype: of the product's operands; all
        else is float32.
        """
        operands = x.astype(dtype), self.weight[...].astype(dtype)
        logits = jnp.einsum("btd,de->bte", *operands, preferred_element_type=jnp.float32)
        scores = jax.nn.sigmoid(logits) if self.cfg.scoring_func == "sigmoid" else jax.nn.softmax(logits, axis=-1)
        chosen = checkpoint_name(choose_experts(jax.lax.stop_gradient(scores), bias, self.cfg), "routing")
        indices = chosen if indices is None else jnp.where(indices[..., :1] < 0, chosen, indices)
        return Routing(indices, gate_weights(scores, indices, self.cfg), scores)


def choose_experts(scores: Float[Array, "B T E"], bias: Float[Array, "E"], cfg: ModelConfig) -> Int[Array, "B T K"]:
    """Indices of the num_experts_per_tok experts of each token, within its best topk_group groups.

    `greedy` takes the highest scores; `group_limited_greedy` (V2) ranks groups by their best score; `noaux_tc` (V3,
    arXiv:2412.19437, section 2.1.2) adds the bias first and ranks groups by the sum of their two best.
    """
    if cfg.topk_method == "noaux_tc":
        scores = scores + bias
    if cfg.n_group > 1:
        grouped = scores.reshape(*scores.shape[:-1], cfg.n_group, -1)
        best = 2 if cfg.topk_method == "noaux_tc" else 1
        rank = jnp.sum(jax.lax.top_k(grouped, best)[0], axis=-1)
        kept = one_hot_sum(jax.lax.top_k(rank, cfg.topk_group)[1], cfg.n_group)
        # -inf and not 0: a biased score may be negative
        scores = jnp.where(kept[..., None] > 0, grouped, -jnp.inf).reshape(scores.shape)
    return jax.lax.top_k(scores, cfg.num_experts_per_tok)[1]


def gate_weights(
    scores: Float[Array, "B T E"], indices: Int[Array, "B T K"], cfg: ModelConfig
) -> Float[Array, "B T K"]:
    """Share of each chosen expert in the output, from the raw scores: the bias moves the choice alone.

    V3 normalises and scales; V2 and V1 scale only where they do not normalise (reference section 3.2).
    """
    weights = jnp.take_along_axis(scores, indices, axis=-1)
    if cfg.norm_topk_prob:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
        if cfg.topk_method != "noaux_tc":
            return weights
    return weights * cfg.routed_scaling_factor


def one_hot_sum(indices: Int[Array, "*B K"], n: int) -> Float[Array, "*B n"]:
    """1.0 at the indices, 0.0 elsewhere: a top-k's choice as a mask."""
    return jnp.sum(indices[..., None] == jnp.arange(n), axis=-2, dtype=jnp.float32)
