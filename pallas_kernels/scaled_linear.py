"""Linear layers and SwiGLU in FP8: operands are quantised on the way in, in gradients too, and what the backward pass
needs is kept in FP8 (arXiv:2412.19437, section 3.3; reference sections 5.1 and 5.2).
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pallas_kernels import quantise as quantising
from pallas_kernels.quantise import Quantised, Tile, dequantise
from pallas_kernels.scaled_matmul import scaled_gradient, scaled_matmul


class Product(NamedTuple):
    """The tiles of a product's operands, as the arrays lie in memory; of equal length along what is summed over."""

    left: Tile
    right: Tile


@dataclass(frozen=True)
class Scaling:
    """How y = x w, with x [M, K] and w [K, N], and its gradients are quantised."""

    forward: Product  # x, w
    input_gradient: Product  # dy, w
    weight_gradient: Product  # x, dy
    kept: Tile | None  # x for the backward pass, and what goes into SwiGLU; None: x as it came
    implementation: str = "auto"  # of the products, and of quantisation where that has one of the name


def scaled_linears(
    x: Float[Array, "M K"],
    ws: tuple[Float[Array, "*E K _N"] | Quantised, ...],
    scaling: Scaling,
    group_sizes: Int[Array, "E"] | None = None,
    alignment: int = 1,
) -> tuple[Float[Array, "M _N"], ...]:
    """x times each of ws, in the dtype of x; with group_sizes and alignment, as in `grouped_matmul`, by groups of rows.

    Weights that are quantised already, in the tiles of scaling.forward, are taken as they are; else differentiable
    once, in x and ws. The weight gradient's operands are quantised anew, x from what was kept of it.
    """
    return _linears(_in_groups(x, group_sizes), ws, group_sizes, scaling, alignment)


def scaled_swiglu(
    x: Float[Array, "M D"],
    row_weights: Float[Array, "M"] | None,
    w_gate: Float[Array, "*E D F"] | Quantised,
    w_up: Float[Array, "*E D F"] | Quantised,
    w_down: Float[Array, "*E F D"] | Quantised,
    scaling: Scaling,
    group_sizes: Int[Array, "E"] | None = None,
    alignment: int = 1,
) -> Float[Array, "M D"]:
    """(silu(x w_gate) * x w_up * row_weights) w_down. What goes into SwiGLU is kept in FP8, what leaves it not at all.

    For jax.checkpoint what is kept of the products with w_gate and w_up is named "mlp_gate" and "mlp_up".
    """
    gate, up = scaled_linears(x, (w_gate, w_up), scaling, group_sizes, alignment)
    factors = gate, up, *(() if row_weights is None else (row_weights[:, None],))
    return _down(factors, w_down, group_sizes, scaling, alignment)


def _quantise(x, tile: Tile, scaling: Scaling) -> Quantised:
    if isinstance(x, Quantised):
        return x
    return quantising.quantise(x, tile, implementation=_quantiser(scaling))


def _quantiser(scaling: Scaling) -> str:
    return scaling.implementation if scaling.implementation in quantising.IMPLEMENTATIONS else "auto"


def _in_groups(x, group_sizes):
    """x with zeros for rows in no group, whose values are to count for no scale."""
    if group_sizes is None:
        return x
    return jnp.where((jnp.arange(x.shape[0]) < jnp.sum(group_sizes))[:, None], x, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _linears(x, ws, group_sizes, scaling, alignment):
    return _products(_quantise(x, scaling.forward.left, scaling), x.dtype, ws, group_sizes, scaling, alignment)


def _linears_forward(x, ws, group_sizes, scaling, alignment):
    quantised = _quantise(x, scaling.forward.left, scaling)
    return _products(quantised, x.dtype, ws, group_sizes, scaling, alignment), (
        _kept(x, scaling, quantised),
        ws,
        group_sizes,
    )


def _linears_backward(scaling, alignment, residuals, dys):
    x, ws, group_sizes = residuals
    return *_gradients(_restored(x), ws, dys, group_sizes, scaling, alignment), None


_linears.defvjp(_linears_forward, _linears_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _down(factors, w, group_sizes, scaling, alignment):
    """factors: gate, up, and the rows' weights [M, 1], if there are."""
    (h,) = _swiglu_quantised(factors, scaling, keep=False)
    return _products(h, factors[0].dtype, (w,), group_sizes, scaling, alignment)[0]


def _down_forward(factors, w, group_sizes, scaling, alignment):
    gate, up, *row_weights = factors
    *kept, h = _swiglu_quantised(factors, scaling, keep=scaling.kept == scaling.forward.left)
    kept = [
        jax.tree.map(lambda leaf, name=name: checkpoint_name(leaf, name), a)
        for a, name in zip(kept or [_kept(a, scaling) for a in (gate, up)], ("mlp_gate", "mlp_up"))
    ]
    y = _products(h, gate.dtype, (w,), group_sizes, scaling, alignment)[0]
    return y, (kept, row_weights, w, group_sizes)


def _swiglu_quantised(factors, scaling: Scaling, keep: bool) -> list[Quantised]:
    """SwiGLU as the left operand of a product, in one walk with gate and up before it, quantised alike, to be kept."""

    def of(*factors):
        return (*(factors[:2] if keep else ()), _swiglu(*factors))

    return quantising.quantise_all(of, factors, scaling.forward.left, implementation=_quantiser(scaling))


def _down_backward(scaling, alignment, residuals, dy):
    kept, row_weights, w, group_sizes = residuals
    h, pull = jax.vjp(_swiglu, *map(_restored, kept), *row_weights)
    dh, (dw,) = _gradients(h, (w,), (dy,), group_sizes, scaling, alignment)
    dgate, dup, *dweights = pull(dh.astype(h.dtype))
    return (dgate.astype(dy.dtype), dup.astype(dy.dtype), *dweights), dw, None


_down.defvjp(_down_forward, _down_backward)


def _swiglu(gate, up, row_weights=1.0):
    return (jax.nn.silu(gate.astype(jnp.float32)) * up * row_weights).astype(gate.dtype)


def _products(x: Quantised, dtype, ws, group_sizes, scaling: Scaling, alignment):
    options = {"dtype": dtype, "alignment": alignment, "implementation": scaling.implementation}
    return tuple(scaled_matmul(x, _quantise(w, scaling.forward.right, scaling), group_sizes, **options) for w in ws)


def _gradients(x, ws, dys, group_sizes, scaling: Scaling, alignment):
    """Gradients of x and of ws, from x and those of the products."""
    dys = [_in_groups(dy, group_sizes) for dy in dys]
    of_dy, of_w = scaling.input_gradient
    options = {"alignment": alignment, "implementation": scaling.implementation}
    dx = sum(
        scaled_matmul(
            _quantise(dy, of_dy, scaling),
            _quantise(w, of_w, scaling),
            group_sizes,
            transposed=True,
            dtype=dy.dtype,
            **options,
        )
        for dy, w in zip(dys, ws)
    )
    of_x, of_dy = scaling.weight_gradient
    rows = _quantise(x, of_x, scaling)
    dws = (
        scaled_gradient(rows, _quantise(dy, of_dy, scaling), group_sizes, dtype=w.dtype, **options)
        for dy, w in zip(dys, ws)
    )
    return dx, tuple(dws)


def _kept(x, scaling: Scaling, quantised: Quantised | None = None):
    if scaling.kept is None:
        return x
    return quantised if quantised and quantised.tile == scaling.kept else _quantise(x, scaling.kept, scaling)


def _restored(kept):
    return dequantise(kept) if isinstance(kept, Quantised) else kept
