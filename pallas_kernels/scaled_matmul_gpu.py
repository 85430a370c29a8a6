"""Products of FP8 matrices for Hopper GPUs, in Pallas for Mosaic GPU: `scaled_matmul` and `scaled_gradient` by groups.

As the kernels of grouped_matmul_gpu.py, with tiles of 128 x 128. The tensor core adds up 128 values of E4M3, its sum is
scaled and added in float32 registers, because the tensor core itself keeps about 14 bits of a sum (arXiv:2412.19437,
section 3.3.2). It reads E4M3 along what is summed over alone: weights of the forward product and both operands of the
weights' gradient are given transposed. Found by compiling prototypes (reference, kernels section 3.5).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul_gpu import (
    ALIGNMENT,
    HALF,
    ROWS,
    STAGES,
    align,
    copied_ahead,
    gather,
    launch,
    no_work,
    slots,
    tile_experts,
    too_old,
    transforms,
    write,
    zeros,
)
from pallas_kernels.quantise import Quantised

__all__ = ["ALIGNMENT", "scaled_gradient_gpu", "scaled_matmul_gpu", "unsupported"]

_BLOCK = 128  # values that share a scale, and columns of a tile


def unsupported(left: Quantised, right: Quantised) -> str | None:
    """Why the kernels cannot multiply these, in words; None if they can."""
    if reason := too_old():
        return reason
    pairs = ((1, _BLOCK), (_BLOCK, _BLOCK)), ((_BLOCK, 1), (_BLOCK, 1))
    if (left.tile[:2], right.tile[:2]) not in pairs:
        return f"tiles {left.tile[:2]} and {right.tile[:2]}; expected {' or '.join(map(str, pairs))}"
    return None


def _whole_blocks(x: Quantised, axes: tuple[int, ...]) -> Quantised:
    """x with zeros that make its length along the axes multiples of a block's."""

    def pad(a, tile):
        return jnp.pad(a, [(0, -n % _BLOCK if i in axes and tile[i] == 1 else 0) for i, n in enumerate(a.shape)])

    ones = (1,) * x.values.ndim
    tile = (*ones[2:], *x.tile[:2])
    return Quantised(pad(x.values, ones), pad(x.scales, tile), x.tile)


def scaled_matmul_gpu(
    x: Quantised, w: Quantised, group_sizes: Int[Array, "E"], transposed: bool, dtype, aligned: bool, interpret=False
) -> Float[Array, "M N"]:
    """As `scaled_matmul`; x in tiles of 1 x 128, w in blocks of 128 x 128. aligned: groups begin at multiples of 128.

    Raises ValueError for what the kernels cannot do.
    """
    if reason := unsupported(x, w):
        raise ValueError(f"pallas_gpu: {reason}")
    n = w.values.shape[1 if transposed else 2]
    x, w = _whole_blocks(x, (1,)), _whole_blocks(w, (1, 2))
    values, scales = (w.values, w.scales) if transposed else (w.values.swapaxes(1, 2), w.scales.swapaxes(1, 2))
    if aligned:
        return _rows_times_weights(x.values, x.scales.T, values, scales, group_sizes, dtype, interpret)[:, :n]
    plan = align(group_sizes, x.values.shape[0])
    rows, row_scales = gather(x.values, plan.source), gather(x.scales, plan.source).T
    y = _rows_times_weights(rows, row_scales, values, scales, plan.sizes, dtype, interpret)
    return gather(y[:, :n], plan.place)


def scaled_gradient_gpu(
    x: Quantised, dy: Quantised, group_sizes: Int[Array, "E"], dtype, interpret=False
) -> Float[Array, "E K N"]:
    """As `scaled_gradient`, both in tiles of 128 x 1, for groups that begin at multiples of 128 rows.

    Raises ValueError for what the kernel cannot do.
    """
    if reason := unsupported(x, dy):
        raise ValueError(f"pallas_gpu: {reason}")
    (k, n), x, dy = (x.values.shape[1], dy.values.shape[1]), *(_whole_blocks(a, (1,)) for a in (x, dy))
    dw = _rows_times_rows(x.values.T, x.scales, dy.values.T, dy.scales, group_sizes, dtype, interpret)
    return dw[:, :k, :n]


@functools.partial(jax.jit, static_argnums=(5, 6))  # each shape is lowered once, however often it comes
def _rows_times_weights(x, x_scales, w, w_scales, group_sizes, dtype, interpret):
    """y[row] = sum over blocks b of K of x[row, b] @ w[group of row][:, b].T * x_scales[b, row] * w_scales[.., b]."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    (m, k), n = x.shape, w.shape[1]
    n_tiles, n_columns, n_blocks = m // ROWS, n // _BLOCK, k // _BLOCK
    tiling = transforms(x.dtype)

    def kernel(experts, x, x_scales, w, w_scales, y):
        def pipeline(body, context):
            block = plgpu.BlockSpec((ROWS, _BLOCK), lambda i: (0, i), transforms=tiling)
            return copied_ahead(plgpu, body, context, n_blocks, block, block)

        @functools.partial(
            pl.run_scoped,
            buffers=pipeline(no_work, no_work).get_allocations(x, w.at[0]),
            out=slots(plgpu, dtype),
            collective_axes="warpgroup",
        )
        def _(buffers, out):
            half = lax.axis_index("warpgroup")

            @plgpu.nd_loop((n_tiles * n_columns,), collective_axes="sm")
            def _(step):
                tile, column = plgpu.planar_snake(step.index[0], (n_tiles, n_columns), 0, 8)
                expert, first = experts[tile], tile * ROWS + half * HALF
                rows = y.at[pl.ds(first, HALF)]

                @pl.when(expert >= 0)
                def _():
                    def scale(block):
                        place = x_scales.at[block, pl.ds(first, HALF)]
                        by_row = plgpu.load(place, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
                        return by_row * w_scales[expert, column, block]

                    def context(run):
                        total, _ = run((zeros(plgpu, _BLOCK, jnp.float32), scale(0)))
                        write(plgpu, total.astype(dtype), out.at[half], rows, column * _BLOCK)

                    def body(index, x_tile, w_tile, carry):
                        total, scales = carry

                        def multiply(product):
                            plgpu.wgmma(product, x_tile.at[pl.ds(half * HALF, HALF)], w_tile.T)
                            ahead = scale(jnp.minimum(index[0] + 1, n_blocks - 1))  # fetched while it multiplies
                            return product[...], ahead

                        product, ahead = pl.run_scoped(multiply, plgpu.ACC((HALF, _BLOCK), jnp.float32))
                        return total + product * lax.broadcast_in_dim(scales, product.shape, (0,)), ahead

                    weights = w.at[expert, pl.ds(column * _BLOCK, _BLOCK)]
                    pipeline(body, context)(x.at[pl.ds(tile * ROWS, ROWS)], weights, allocations=buffers)

                @pl.when((expert < 0) & (half < 2))
                def _():
                    write(plgpu, zeros(plgpu, _BLOCK, dtype), out.at[half], rows, column * _BLOCK)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    arrays = tile_experts(group_sizes, n_tiles), x, x_scales, w, w_scales
    return launch(plgpu, kernel, jax.ShapeDtypeStruct((m, n), dtype), interpret)(*arrays)


@functools.partial(jax.jit, static_argnums=(5, 6))
def _rows_times_rows(x, x_scales, dy, dy_scales, group_sizes, dtype, interpret):
    """dw[e] = sum over blocks b of the rows of e of x[:, b] @ dy[:, b].T * x_scales[b] * dy_scales[b]."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    k, n, n_groups = x.shape[0], dy.shape[0], group_sizes.shape[0]
    n_rows, n_columns = k // ROWS, n // _BLOCK
    tiling = transforms(x.dtype)
    steps = group_sizes // _BLOCK
    firsts = jnp.cumsum(steps) - steps
    last = x.shape[1] // _BLOCK - 1

    def kernel(firsts, steps, x, x_scales, dy, dy_scales, dw):
        def pipeline(body, context, first=0, n_steps=STAGES, i=0, j=0):
            return copied_ahead(
                plgpu,
                body,
                context,
                n_steps,
                plgpu.BlockSpec((ROWS, _BLOCK), lambda s: (i, first + s), transforms=tiling),
                plgpu.BlockSpec((_BLOCK, _BLOCK), lambda s: (j, first + s), transforms=tiling),
            )

        @functools.partial(
            pl.run_scoped,
            buffers=pipeline(no_work, no_work).get_allocations(x, dy),
            out=slots(plgpu, dtype),
            collective_axes="warpgroup",
        )
        def _(buffers, out):
            half = lax.axis_index("warpgroup")

            @plgpu.nd_loop((n_groups, n_rows * n_columns), collective_axes="sm")
            def _(step):
                expert = step.index[0]
                i, j = plgpu.planar_snake(step.index[1], (n_rows, n_columns), 0, 8)
                first, own = firsts[expert], pl.ds(i * ROWS + half * HALF, HALF)

                def scale(block):
                    at = jnp.minimum(first + block, last)
                    layout = plgpu.Layout.WGMMA
                    by_row = plgpu.load(x_scales.at[at, own], layout=layout.reduce(1), optimized=False)
                    columns = dy_scales.at[at, pl.ds(j * _BLOCK, _BLOCK)]
                    return by_row, plgpu.load(columns, layout=layout.reduce(0), optimized=False)

                def context(run):
                    total = run(zeros(plgpu, _BLOCK, jnp.float32))
                    write(plgpu, total.astype(dtype), out.at[half], dw.at[expert, own], j * _BLOCK)

                def body(index, x_tile, dy_tile, total):
                    def multiply(product):
                        plgpu.wgmma(product, x_tile.at[pl.ds(half * HALF, HALF)], dy_tile.T)
                        by_row, by_column = scale(index[0])
                        return product[...], by_row, by_column

                    product, by_row, by_column = pl.run_scoped(multiply, plgpu.ACC((HALF, _BLOCK), jnp.float32))
                    by_row, by_column = (
                        lax.broadcast_in_dim(a, product.shape, (d,)) for d, a in enumerate((by_row, by_column))
                    )
                    return total + product * (by_row * by_column)

                pipeline(body, context, first, steps[expert], i, j)(x, dy, allocations=buffers)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    arrays = firsts, steps, x, x_scales, dy, dy_scales
    return launch(plgpu, kernel, jax.ShapeDtypeStruct((n_groups, k, n), dtype), interpret)(*arrays)
