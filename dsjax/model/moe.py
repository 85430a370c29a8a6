"""DeepSeekMoE: shared experts that every token passes, and fine-grained routed ones (reference section 3.1)."""

import functools

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from dsjax.config import ModelConfig
from dsjax.model.router import Router
from dsjax.nn import SwiGLU, param
from dsjax.state import Routing
from pallas_kernels.grouped_matmul import grouped_swiglu
from sharding.dispatch import combine, dispatch
from sharding.rules import constrain, spec


class RoutedExperts(nnx.Module):
    """The routed experts' weights, stacked, and the way of a token through them. Dropless."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        e, d, f, std = cfg.n_routed_experts, cfg.hidden_size, cfg.moe_intermediate_size, cfg.initializer_range
        self.w_gate = param(rngs, (e, d, f), ("experts", "embed", "ff"), std)
        self.w_up = param(rngs, (e, d, f), ("experts", "embed", "ff"), std)
        self.w_down = param(rngs, (e, f, d), ("experts", "ff", "embed"), std)

    def __call__(self, x: Float[Array, "B T D"], routing: Routing, implementation: str) -> Float[Array, "B T D"]:
        """Weighted sum of each token's experts."""
        tokens, up, down = spec("batch", "seq", None), spec("experts", None, "ff"), spec("experts", "ff", None)
        return jax.shard_map(
            functools.partial(_experts_of_device, implementation=implementation),
            in_specs=(tokens, tokens, tokens, up, up, down),
            out_specs=tokens,
            check_vma=False,
        )(
            x,
            routing.indices,
            routing.weights,
            constrain(self.w_gate[...], "experts", None, "ff"),  # the FSDP all-gather
            constrain(self.w_up[...], "experts", None, "ff"),
            constrain(self.w_down[...], "experts", "ff", None),
        )


def _experts_of_device(
    x: Float[Array, "B T D"],
    indices: Int[Array, "B T K"],
    weights: Float[Array, "B T K"],
    w_gate: Float[Array, "E D F"],
    w_up: Float[Array, "E D F"],
    w_down: Float[Array, "E F D"],
    *,
    implementation: str,
) -> Float[Array, "B T D"]:
    """One device's part: its tokens out to the experts' owners, its experts' work, its tokens back."""
    b, t, d = x.shape
    k = indices.shape[-1]
    flat = (x.reshape(b * t, d), indices.reshape(b * t, k), weights.reshape(b * t, k))
    rows, row_weights, plan = dispatch(*flat, n_local_experts=w_gate.shape[0])
    weights = w_gate, w_up, w_down
    y = grouped_swiglu(rows, row_weights, *weights, plan.group_sizes, implementation=implementation)
    return combine(y, plan, k).reshape(b, t, d)


class MoE(nnx.Module):
    """Routed experts plus one SwiGLU of the shared experts' joint width."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.router = Router(cfg, rngs=rngs)
        self.experts = RoutedExperts(cfg, rngs=rngs)
        if cfg.n_shared_experts:
            width = cfg.n_shared_experts * cfg.moe_intermediate_size
            self.shared = SwiGLU(cfg.hidden_size, width, cfg.initializer_range, rngs=rngs)
        self.n_shared_experts = cfg.n_shared_experts

    def __call__(
        self, x: Float[Array, "B T D"], bias: Float[Array, "E"], implementation: str = "auto"
    ) -> tuple[Float[Array, "B T D"], Routing]:
        """The layer's output and where its tokens went."""
        routing = self.router(x, bias)
        y = self.experts(x, routing, implementation)
        if self.n_shared_experts:
            y = y + self.shared(x)
        return y, routing
