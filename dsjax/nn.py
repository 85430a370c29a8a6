"""The small parts: one weight, n modules as one, a linear layer, RMSNorm, SwiGLU."""

import math
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P, lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from pallas_kernels.quantise import Quantised
from pallas_kernels.row_matmul import FEW, row_matmul
from pallas_kernels.scaled_linear import Scaling, scaled_linears, scaled_swiglu
from sharding.rules import as_rows, as_tokens, spec, whole


def param(rngs: nnx.Rngs, shape: tuple[int, ...], names: tuple[str | None, ...], std: float = 0.0) -> nnx.Param:
    """One float32 weight, born sharded: N(0, std^2), or ones when std is 0."""
    make = jax.nn.initializers.normal(std) if std else jax.nn.initializers.ones
    return nnx.Param(make(rngs.params(), shape, jnp.float32, out_sharding=spec(*names)))


def stack(make: Callable[[nnx.Rngs], nnx.Module], n: int, rngs: nnx.Rngs) -> nnx.Module:
    """n modules as one: every leaf gains a leading [n] axis, ready for `jax.lax.scan`."""
    return jax.vmap(lambda key: make(nnx.Rngs(params=key)))(jax.random.split(rngs.params(), n))


def linear(
    x: Float[Array, "B T *K"],
    w: Float[Array, "*W"] | Quantised,
    name: str | None = None,
    scaling: Scaling | None = None,
) -> Float[Array, "B T *N"]:
    """x times w [*K, *N], summed over all axes of x but batch and sequence; `name` is what the first of *N is.

    Tokens are rows of one matrix here: where batch and sequence are two axes, XLA:CPU makes the weights' gradients
    from transposed copies. scaling: in FP8, the tiles on each device's own rows and its part of heads or widths; so
    too the weights that are kept quantised.
    """
    n = x.ndim - 2
    rows, matrix = as_rows(x), _matrix(w, n)
    layout = P(jax.typeof(rows).sharding.spec[0], *spec(name))
    if scaling is None and few(x):
        local = jax.shard_map(row_matmul, in_specs=(P(), P()), out_specs=P(), check_vma=False)
        y = jax.reshard(local(*(jax.reshard(a, P()) for a in (rows, matrix))), layout)
    elif scaling is None:
        y = jnp.einsum("nk,km->nm", rows, matrix, out_sharding=layout)
    else:
        y = _on_devices(lambda x, w: scaled_linears(x, (w,), scaling)[0], rows, matrix, layout=layout)
    return as_tokens(y, x, *w.shape[n:])


def few(x: Float[Array, "B T *K"]) -> bool:
    """Whether these are the tokens of a decoding step on a CPU."""
    small = x.shape[0] * x.shape[1] <= FEW and x.dtype == jnp.float32
    return small and jax.default_backend() == "cpu" and jax.typeof(x).sharding.mesh.size == 1


def _matrix(w, n: int):
    """w with its first n dimensions as one, and the others as one."""
    if isinstance(w, Quantised):
        return replace(w, values=_matrix(w.values, n))
    return w.reshape(math.prod(w.shape[:n]), -1)


def _on_devices(local, rows, *weights, layout: P):
    """local(rows, *weights) on each device: with its own rows, and whole weights but for what `tensor` spreads, over
    which results are summed if they are not spread themselves."""
    layouts = jax.tree.map(lambda w: jax.typeof(w).sharding.spec, weights)
    partial = "tensor" not in layout and any("tensor" in axes for axes in jax.tree.leaves(layouts))

    def gather(w, axes):
        for i, names in enumerate(axes):
            if names not in (None, "tensor"):
                w = whole(w, names, i)
        return w

    def part(rows, *shards):
        y = local(rows, *jax.tree.map(gather, shards, layouts))
        return lax.psum(y, "tensor") if partial else y

    specs = jax.typeof(rows).sharding.spec, *layouts
    return jax.shard_map(part, in_specs=specs, out_specs=layout, check_vma=False)(rows, *weights)


def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "*B D"]:
    """x / rms(x) * scale, in float32, returned in x's dtype."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
    return (y * scale.astype(jnp.float32)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root mean square normalisation with a learned scale, kept in float32."""

    def __init__(self, dim: int, eps: float, *, rngs: nnx.Rngs):
        self.scale = param(rngs, (dim,), (None,))
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return rms_norm(x, self.scale[...], self.eps)


class SwiGLU(nnx.Module):
    """Gated feed-forward: w_down(silu(w_gate x) * w_up x)."""

    def __init__(self, hidden_size: int, intermediate_size: int, std: float, *, rngs: nnx.Rngs):
        d, f = hidden_size, intermediate_size
        self.w_gate = param(rngs, (d, f), ("embed", "ff"), std)
        self.w_up = param(rngs, (d, f), ("embed", "ff"), std)
        self.w_down = param(rngs, (f, d), ("ff", "embed"), std)

    def __call__(self, x: Float[Array, "B T D"], scaling: Scaling | None = None) -> Float[Array, "B T D"]:
        if scaling is not None:
            rows, weights = as_rows(x), (w[...] for w in (self.w_gate, self.w_up, self.w_down))
            y = _on_devices(
                lambda x, *w: scaled_swiglu(x, None, *w, scaling), rows, *weights, layout=jax.typeof(rows).sharding.spec
            )
            return as_tokens(y, x, self.w_down.shape[1])
        gate = checkpoint_name(linear(x, self.w_gate[...], "ff"), "mlp_gate")
        up = checkpoint_name(linear(x, self.w_up[...], "ff"), "mlp_up")
        return linear(jax.nn.silu(gate) * up, self.w_down[...])
