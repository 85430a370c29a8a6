"""The small parts: one weight, n modules as one, a token's matmul, RMSNorm, SwiGLU."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from sharding.rules import spec


def param(rngs: nnx.Rngs, shape: tuple[int, ...], names: tuple[str | None, ...], std: float = 0.0) -> nnx.Param:
    """One float32 weight, born sharded: N(0, std^2), or ones when std is 0."""
    make = jax.nn.initializers.normal(std) if std else jax.nn.initializers.ones
    return nnx.Param(make(rngs.params(), shape, jnp.float32, out_sharding=spec(*names)))


def stack(make: Callable[[nnx.Rngs], nnx.Module], n: int, rngs: nnx.Rngs) -> nnx.Module:
    """n modules as one: every leaf gains a leading [n] axis, ready for `jax.lax.scan`."""
    return jax.vmap(lambda key: make(nnx.Rngs(params=key)))(jax.random.split(rngs.params(), n))


def row_times_matrix(x: Float[Array, "1 D"], w: Float[Array, "D N"]) -> Float[Array, "1 N"]:
    """x @ w in float32, on two cores of a CPU.

    XLA:CPU reads a matrix on one core when it has one row to multiply, and each matrix of a batch on its own.
    """
    if w.shape[0] % 2:
        return jnp.matmul(x, w, preferred_element_type=jnp.float32)
    halves = jnp.einsum(
        "pbd,pdn->pbn", x.reshape(2, 1, -1), w.reshape(2, -1, w.shape[1]), preferred_element_type=jnp.float32
    )
    return halves[0] + halves[1]


def project(subscripts: str, x: Float[Array, "B T *D"], w: nnx.Param | Array, **options) -> Float[Array, "B T *N"]:
    """jnp.einsum of activations and a weight that starts with all dimensions summed over; quick for a single token."""
    einsum = functools.partial(jnp.einsum, subscripts, **options)
    w = w[...]
    if x.shape[:2] != (1, 1) or jax.default_backend() != "cpu" or jax.typeof(w).sharding.mesh.size > 1:
        return einsum(x, w)
    out = jax.eval_shape(einsum, x, w)
    whole = math.prod(x.shape), math.prod(out.shape)
    y = row_times_matrix(jax.reshard(x, P()).reshape(1, -1), jax.reshard(w, P()).reshape(whole))
    return jax.reshard(y.astype(out.dtype).reshape(out.shape), out.sharding.spec)


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

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate = checkpoint_name(project("btd,df->btf", x, self.w_gate), "mlp_gate")
        up = checkpoint_name(project("btd,df->btf", x, self.w_up), "mlp_up")
        return project("btf,fd->btd", jax.nn.silu(gate) * up, self.w_down, out_sharding=spec("batch", "seq", None))
