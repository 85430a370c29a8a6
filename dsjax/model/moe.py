"""DeepSeekMoE: shared experts that every token passes, and fine-grained routed ones (reference section 3.1)."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P, lax
from jaxtyping import Array, Float, Int

from dsjax.config import ComputeConfig, ModelConfig, replace
from dsjax.model.router import Router
from dsjax.nn import SwiGLU, few, param
from dsjax.precision import recipe_of
from dsjax.state import Replicas, Routing
from pallas_kernels.grouped_matmul import ALIGNMENT, choose, grouped_swiglu, slice_float32
from pallas_kernels.quantise import Quantised
from pallas_kernels.row_matmul import row_matmul
from pallas_kernels.scaled_linear import Scaling, scaled_swiglu
from sharding.dispatch import Buffers, combine, dispatch
from sharding.rules import TOKEN_AXES, constrain, spec, whole

CHEAP_BYTES = 64 << 20  # of a buffer of rows that is no matter, whatever compute.expert_buffer


class RoutedExperts(nnx.Module):
    """The routed experts' weights, stacked, and the way of a token through them. Dropless."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        e, d, f, std = cfg.n_routed_experts, cfg.hidden_size, cfg.moe_intermediate_size, cfg.initializer_range
        self.w_gate = param(rngs, (e, d, f), ("experts", "width", "ff"), std)
        self.w_up = param(rngs, (e, d, f), ("experts", "width", "ff"), std)
        self.w_down = param(rngs, (e, f, d), ("experts", "ff", "width"), std)
        self.cfg = cfg

    def __call__(
        self, x: Float[Array, "B T D"], routing: Routing, compute: ComputeConfig
    ) -> tuple[Float[Array, "B T D"], Int[Array, ""]]:
        """Weighted sum of each token's experts, and how many rows and pairs had no room and are left out."""
        tokens = spec("batch", "seq", None)
        up, down = spec("experts", "width", "ff"), spec("experts", "ff", "width")
        return jax.shard_map(
            functools.partial(
                _experts_of_device,
                buffers=self._buffers(compute),
                implementation=compute.grouped_matmul,
                scaling=recipe_of(compute).experts,
            ),
            in_specs=(tokens, tokens, tokens, up, up, down),
            out_specs=(tokens, P()),
            check_vma=False,
        )(
            x,
            routing.indices,
            routing.weights,
            self.w_gate[...],
            self.w_up[...],
            self.w_down[...],
        )

    def decode(self, x: Float[Array, "B T D"], routing: Routing, compute: ComputeConfig) -> Float[Array, "B T D"]:
        """The same, quick for a few tokens on a CPU; whatever the loads, nothing is left out."""
        if not few(x) or recipe_of(compute).experts or choose(compute.grouped_matmul) != "tiles":
            return self(x, routing, replace(compute, expert_buffer=None))[0]
        arguments = x, routing.indices, routing.weights, self.w_gate[...], self.w_up[...], self.w_down[...]
        y = jax.shard_map(_few_tokens, in_specs=(P(),) * len(arguments), out_specs=P(), check_vma=False)(
            *(jax.reshard(a, P()) for a in arguments)
        )
        return constrain(y, "batch", "seq", None)

    def _buffers(self, compute: ComputeConfig) -> Buffers:
        n_group, groups = self.cfg.n_group, compute.expert_groups
        # Where a group of devices holds whole groups of experts, a token's choices lie in topk_group of them.
        replicated = self.w_gate.shape[0] != self.cfg.n_routed_experts
        limit = self.cfg.topk_group if n_group % groups == 0 and not replicated else None
        recipe = recipe_of(compute)
        cheap = CHEAP_BYTES // (self.cfg.hidden_size * jnp.dtype(recipe.dtype).itemsize)
        own = 1 if isinstance(self.w_gate[...], Quantised) else recipe.alignment()  # that of gradients
        alignment = math.lcm(own, ALIGNMENT.get(choose(compute.grouped_matmul), 1))
        options = compute.exchange, alignment, compute.fp8_dispatch
        return Buffers(compute.expert_buffer, cheap, groups, limit, *options)


def _few_tokens(
    x: Float[Array, "B T D"],
    indices: Int[Array, "B T K"],
    weights: Float[Array, "B T K"],
    w_gate: Float[Array, "E D F"],
    w_up: Float[Array, "E D F"],
    w_down: Float[Array, "E F D"],
) -> Float[Array, "B T D"]:
    """All tokens through one chosen expert after the other, whose weights are what takes time: there is nothing to
    line up, to pad or to bring back. An expert that a token did not choose adds 0 to it, so that no token depends on
    the others."""
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    indices, weights = (a.reshape(rows.shape[0], -1) for a in (indices, weights))
    if rows.shape[0] == 1:
        chosen, n = indices[0], indices.shape[1]
    else:
        present = jnp.zeros(w_gate.shape[0], bool).at[indices].set(True)
        chosen, n = jnp.argsort(~present, stable=True), jnp.sum(present)

    def add_expert(i, y):
        gate, up, down = (slice_float32(w, chosen[i], 1)[0] for w in (w_gate, w_up, w_down))
        own = indices == chosen[i]
        weight = jnp.sum(jnp.where(own, weights, 0), axis=1, keepdims=True)
        h = jax.nn.silu(row_matmul(rows, gate)) * row_matmul(rows, up) * weight
        return y + row_matmul(jnp.where(jnp.any(own, axis=1, keepdims=True), h, 0), down)

    return lax.fori_loop(0, n, add_expert, jnp.zeros_like(rows)).astype(x.dtype).reshape(x.shape)


def _experts_of_device(
    x: Float[Array, "B T D"],
    indices: Int[Array, "B T K"],
    weights: Float[Array, "B T K"],
    w_gate: Float[Array, "E D_fsdp F"] | Quantised,
    w_up: Float[Array, "E D_fsdp F"] | Quantised,
    w_down: Float[Array, "E F D_fsdp"] | Quantised,
    *,
    buffers: Buffers,
    implementation: str,
    scaling: Scaling | None,
) -> tuple[Float[Array, "B T D"], Int[Array, ""]]:
    """One device's part: its tokens out to the experts' owners, its experts' work, its tokens back."""
    flat = (a.reshape(-1, a.shape[-1]) for a in (x, indices, weights))
    rows, row_weights, plan = dispatch(*flat, n_local_experts=w_gate.shape[0], buffers=buffers)
    # The FSDP all-gather, in here: its gradient is a reduce-scatter, where that of a reshard before is an all-reduce.
    gather = lambda w, i: jax.tree.map(lambda a: whole(a, "fsdp", i), w)  # noqa: E731
    weights = [gather(w, i) for w, i in ((w_gate, 1), (w_up, 1), (w_down, 2))]
    if scaling is None:
        options = {"implementation": implementation, "alignment": buffers.alignment}
        y = grouped_swiglu(rows, row_weights, *weights, plan.group_sizes, **options)
    else:
        y = scaled_swiglu(rows, row_weights, *weights, scaling, plan.group_sizes, buffers.alignment)
    return combine(y, plan).reshape(x.shape), lax.psum(plan.overflow, TOKEN_AXES)


@jax.jit
def rearrange(w: Float[Array, "L E *F"], came_from: Int[Array, "L R"]) -> Float[Array, "L R *F"]:
    """Routed experts' weights of all layers, [came_from[l, r]] of the old places at each new one, layer after layer."""
    held = jax.typeof(w).sharding.spec

    def local(w, came_from):
        def layer(pair):
            return whole(pair[0], "expert")[pair[1]]

        return lax.map(layer, (w, came_from))

    return jax.shard_map(local, in_specs=(held, P(None, "expert")), out_specs=held, check_vma=False)(
        w, jax.reshard(came_from, P(None, "expert"))
    )


def _in_turn(indices: Int[Array, "B T K"], replicas: Replicas) -> Int[Array, "B T K"]:
    """The places of chosen experts: neighbouring tokens go to different ones."""
    t = indices.shape[1]

    def local(indices, place, count):
        turn = jnp.arange(indices.shape[0] * t).reshape(-1, t, 1) % count[indices]
        return place[indices, turn]

    layout = spec("batch", "seq", None)
    return jax.shard_map(local, in_specs=(layout, P(), P()), out_specs=layout, check_vma=False)(
        indices, replicas.place, replicas.count
    )


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
        self,
        x: Float[Array, "B T D"],
        bias: Float[Array, "E"],
        compute: ComputeConfig = ComputeConfig(),
        replay: Int[Array, "B T K"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Routing, Int[Array, ""]]:
        """The layer's output, where its tokens went, and how many rows and pairs did not fit the experts' buffers.

        replay: experts to send tokens to, as `Router` takes them.
        """
        recipe = recipe_of(compute)
        routing = self.router(x, bias, indices=replay, dtype=recipe.router)
        y, overflow = self.experts(x, routing, compute)
        return self._with_shared(x, y, recipe.shared), routing, overflow

    def decode(
        self,
        x: Float[Array, "B T D"],
        bias: Float[Array, "E"],
        compute: ComputeConfig = ComputeConfig(),
        replicas: Replicas | None = None,
    ) -> tuple[Float[Array, "B T D"], Routing]:
        """The output for new tokens of a decoding step, and the experts that were chosen.

        replicas: of this layer, [E, R] and [E], if the experts' weights are those of places. An expert's tokens take
        its places in turn.
        """
        routing = self.router(x, bias)
        placed = routing if replicas is None else routing.replace(indices=_in_turn(routing.indices, replicas))
        y = self.experts.decode(x, placed, compute)
        return self._with_shared(x, y, recipe_of(compute).shared), routing

    def _with_shared(self, x, y, scaling=None):
        return y + self.shared(x, scaling) if self.n_shared_experts else y
