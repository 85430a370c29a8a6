"""Products of FP8 matrices: each block of what is summed over is scaled, and added up in float32.

arXiv:2412.19437, section 3.3.2; reference section 5.2.

`scaled_matmul` is rows times weights, `scaled_gradient` rows times rows, the gradient of weights; both dense, or by
groups as in grouped_matmul.py. "emulated" is their definition, in the order of operations of the kernels.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import grouped_matmul as unscaled
from pallas_kernels import scaled_matmul_gpu as gpu
from pallas_kernels.choice import choose, warn_once
from pallas_kernels.grouped_matmul_tpu import walk
from pallas_kernels.quantise import Quantised, dequantise, length, spread
from pallas_kernels.scaled_matmul_tpu import pallas_gradient, pallas_matmul

IMPLEMENTATION_BY_PLATFORM = {"cpu": "emulated", "tpu": "pallas_tpu", "gpu": "pallas_gpu"}


def scaled_matmul(
    x: Quantised,
    w: Quantised,
    group_sizes: Int[Array, "E"] | None = None,
    *,
    transposed: bool = False,
    dtype=jnp.bfloat16,
    implementation: str = "auto",
    alignment: int = 1,
) -> Float[Array, "M N"]:
    """x [M, K] times w [K, N], or times w [N, K] transposed; with group_sizes, w [E, ...] by groups of rows.

    Groups and rows in none of them are as in `grouped_matmul`. The tiles of x and w must be equally long along K: of
    each such block the product is scaled by row and by column and added to the sum, in float32; the sum is rounded to
    dtype. implementation: "auto" (by platform), "emulated", "dequantised" (operands times their scales rounded to
    bfloat16, for chips without FP8), "pallas_tpu" (either of them, as the chip can), "pallas_interpret" (the same
    kernels on any platform, slowly) or "pallas_gpu" (Hopper; what it cannot multiply is dequantised, with a line in the
    log); any other name raises ValueError, and so do tiles that do not fit. alignment: as in `grouped_matmul`.
    """
    along_x, along_w = x.tile.columns, w.tile.columns if transposed else w.tile.rows
    if along_x != along_w:
        raise ValueError(f"scaled matmul: tiles of {along_x} and {along_w} values along K; expected as many")
    name = choose(implementation, IMPLEMENTATION_BY_PLATFORM, IMPLEMENTATIONS)
    if name == "pallas_gpu" and (sizes := _for_gpu(x, w, group_sizes)) is not None:
        w = w if group_sizes is not None else jax.tree.map(lambda a: a[None], w)
        aligned = group_sizes is None or alignment % gpu.ALIGNMENT == 0
        return gpu.scaled_matmul_gpu(x, w, sizes, transposed, dtype, aligned)
    return IMPLEMENTATIONS[name][0](x, w, group_sizes, transposed, dtype)


def scaled_gradient(
    x: Quantised,
    dy: Quantised,
    group_sizes: Int[Array, "E"] | None = None,
    *,
    dtype=jnp.float32,
    implementation: str = "auto",
    alignment: int = 1,
) -> Float[Array, "*E K N"]:
    """x [M, K] transposed times dy [M, N]; with group_sizes, of each group's rows by themselves, [E, K, N].

    The tiles must be equally long along M, and lie on the rows as they come, wherever groups begin; otherwise as
    `scaled_matmul`.
    """
    if x.tile.rows != dy.tile.rows:
        raise ValueError(f"scaled gradient: tiles of {x.tile.rows} and {dy.tile.rows} rows; expected as many")
    name = choose(implementation, IMPLEMENTATION_BY_PLATFORM, IMPLEMENTATIONS)
    aligned = group_sizes is None or alignment % gpu.ALIGNMENT == 0
    if name == "pallas_gpu" and aligned and (sizes := _for_gpu(x, dy, group_sizes)) is not None:
        dw = gpu.scaled_gradient_gpu(x, dy, sizes, dtype)
        return dw if group_sizes is not None else dw[0]
    return IMPLEMENTATIONS[name][1](x, dy, group_sizes, dtype)


def _for_gpu(left: Quantised, right: Quantised, group_sizes):
    """The groups for the kernels for GPUs, one if there are none; None for what they cannot multiply."""
    reason = gpu.unsupported(left, right)
    if left.values.shape[0] % gpu.ALIGNMENT:
        reason = reason or f"{left.values.shape[0]} rows; expected a multiple of {gpu.ALIGNMENT}"
    if reason:
        warn_once(f"FP8 matmul by dequantising, not by the kernels for GPUs: {reason}")
        return None
    rows = left.values.shape[0]
    return jnp.full(1, rows, jnp.int32) if group_sizes is None else group_sizes.astype(jnp.int32)


def _emulated_matmul(x: Quantised, w: Quantised, group_sizes, transposed: bool, dtype):
    m, size = x.values.shape[0], length(x.tile.columns, x.values.shape[1])
    values, scales = w.values, w.scales
    if transposed and group_sizes is None:
        values, scales = values.T, scales.T
    over = -1 if transposed and group_sizes is not None else -2  # the axis of w that is summed over
    n = values.shape[-3 - over]  # the other one
    columns = w.tile.rows if transposed else w.tile.columns
    x_scales = spread(x.scales.T, x.tile.rows, m)  # [blocks, M]
    w_scales = spread(jnp.moveaxis(scales, over, 0), columns, n)  # [blocks, *E, N]
    if group_sizes is not None:
        group = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(m), side="right")
        own = jnp.minimum(group, group_sizes.shape[0] - 1)  # a row in no group is zeros whatever its scale

    def add(total, block):
        x_block, w_block, by_row, by_column = block
        x_block, w_block = x_block.astype(jnp.float32), w_block.astype(jnp.float32)
        if group_sizes is None:
            return total + x_block @ w_block * (by_row[:, None] * by_column), None
        y = unscaled.rows_times_weights(x_block, w_block, group_sizes, transposed)
        return total + y * (by_row[:, None] * by_column[own]), None

    blocks = _blocks(x.values, 1, size), _blocks(values, over, size), x_scales, w_scales
    return lax.scan(add, jnp.zeros((m, n), jnp.float32), blocks)[0].astype(dtype)


def _emulated_gradient(x: Quantised, dy: Quantised, group_sizes, dtype):
    (m, k), n = x.values.shape, dy.values.shape[1]
    size = length(x.tile.rows, m)
    blocks = (
        _blocks(x.values, 0, size),
        _blocks(dy.values, 0, size),
        spread(x.scales, x.tile.columns, k),
        spread(dy.scales, dy.tile.columns, n),
    )

    def product(block, own=None):
        x_block, dy_block, x_scale, dy_scale = block
        both = (x_block.astype(jnp.float32), dy_block.astype(jnp.float32))
        x_block, dy_block = both if own is None else (jnp.where(own, a, 0) for a in both)
        return x_block.T @ dy_block * (x_scale[:, None] * dy_scale)

    if group_sizes is None:
        dw = lax.scan(lambda dw, block: (dw + product(block), None), jnp.zeros((k, n), jnp.float32), blocks)[0]
        return dw.astype(dtype)
    steps = walk(group_sizes.astype(jnp.int32), m, size, empty=True)

    def add(i, dw):
        group, tile = steps.group[i], steps.tile[i]
        row = tile * size + jnp.arange(size)[:, None]
        own = (row >= steps.starts[group]) & (row < steps.starts[group + 1])
        return dw.at[group].add(product([a[tile] for a in blocks], own))

    dw = lax.fori_loop(0, steps.n_steps, add, jnp.zeros((group_sizes.shape[0], k, n), jnp.float32))
    return dw.astype(dtype)


def _blocks(x, axis: int, size: int):
    """x cut along an axis into blocks of `size`, stacked in front; zeros complete the last."""
    axis %= x.ndim
    x = jnp.pad(x, [(0, -n % size if i == axis else 0) for i, n in enumerate(x.shape)])
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis, 0)


def _dequantised_matmul(x: Quantised, w: Quantised, group_sizes, transposed: bool, dtype):
    x, w = (dequantise(a, jnp.bfloat16) for a in (x, w))
    if group_sizes is not None and transposed:
        y = jnp.zeros((x.shape[0], w.shape[1]), x.dtype)
        return jax.vjp(lambda y: unscaled.grouped_matmul(y, w, group_sizes), y)[1](x)[0].astype(dtype)
    if group_sizes is not None:
        return unscaled.grouped_matmul(x, w, group_sizes).astype(dtype)
    contract = ((1,), (1 if transposed else 0,)), ((), ())
    return lax.dot_general(x, w, contract, preferred_element_type=jnp.float32).astype(dtype)


def _dequantised_gradient(x: Quantised, dy: Quantised, group_sizes, dtype):
    x, dy = (dequantise(a, jnp.bfloat16) for a in (x, dy))
    if group_sizes is None:
        return jnp.einsum("mk,mn->kn", x, dy, preferred_element_type=jnp.float32).astype(dtype)
    weights = jnp.zeros((group_sizes.shape[0], x.shape[1], dy.shape[1]), jnp.bfloat16)
    return jax.vjp(lambda w: unscaled.grouped_matmul(x, w, group_sizes), weights)[1](dy)[0].astype(dtype)


IMPLEMENTATIONS: dict[str, tuple[Callable, Callable]] = {
    "emulated": (_emulated_matmul, _emulated_gradient),
    "dequantised": (_dequantised_matmul, _dequantised_gradient),
    "pallas_gpu": (_dequantised_matmul, _dequantised_gradient),  # where its kernels cannot
    "pallas_tpu": (pallas_matmul, pallas_gradient),
    "pallas_interpret": tuple(functools.partial(f, interpret=True) for f in (pallas_matmul, pallas_gradient)),
}
