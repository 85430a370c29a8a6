"""Quantisation for TPUs, in Pallas: one pass over a matrix, bit for bit the definition in quantise.py.

XLA makes several: of tiles along a row, and of square ones, it writes the matrix by tiles in float32 first.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.grouped_matmul_tpu import VMEM_BYTES, largest, parameters, sizes, slices

_STRIP = 128  # rows, or columns, that are quantised at a time
_BLOCK = VMEM_BYTES // 16  # bytes of x in a block, at most


def takes(rows: int, columns: int, shape: tuple[int, ...]) -> bool:
    """Whether there is a kernel for tiles of rows x columns of a matrix of this shape: not if they are too large, or
    neither one nor all nor a multiple of 128 of its values."""
    *_, r, c = shape
    whole = all(n in (1, size) or n % 128 == 0 for n, size in ((rows, r), (columns, c)))
    return whole and 0 not in shape and (rows, columns) != (1, 1) and _rows_of_a_block(rows, columns, r, c) > 0


def pallas_tpu(
    x: Float[Array, "R C"],
    rows: int,
    columns: int,
    scale_of: Callable,
    *,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "R C"], Float[Array, "Tr Tc"]]:
    """(values, scales) of tiles that a kernel takes; scale_of(largest absolute values) gives their scales."""
    r, c = x.shape
    across = _columns_of_a_block(columns, c)
    down = _rows_of_a_block(rows, columns, r, c)
    n_rows, n_columns = down // rows, across if columns == 1 else pl.cdiv(c, columns)
    values, scales = pl.pallas_call(
        functools.partial(_row_kernel if rows == 1 else _tile_kernel, n_rows=r, columns=columns, scale_of=scale_of),
        out_shape=(
            jax.ShapeDtypeStruct((r, c), jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((pl.cdiv(r, down), n_rows, c if columns == 1 else n_columns), jnp.float32),
        ),
        grid=(pl.cdiv(r, down), pl.cdiv(c, across)),
        in_specs=[pl.BlockSpec((down, across), lambda i, j: (i, j))],
        out_specs=(
            pl.BlockSpec((down, across), lambda i, j: (i, j)),
            pl.BlockSpec((pl.squeezed, n_rows, n_columns), lambda i, j: (i, 0, j)),
        ),
        compiler_params=parameters("parallel", "parallel"),
        interpret=interpret,
        name="quantise",
    )(x)
    return values, scales.reshape(-1, scales.shape[-1])[: pl.cdiv(r, rows)]


def _columns_of_a_block(columns: int, c: int) -> int:
    """All, where tiles lie along them; else as many as make long reads."""
    return c if columns > 1 else largest(-(-c // 128) * 128, 1024) if c > 1024 else c


def _rows_of_a_block(rows: int, columns: int, r: int, c: int) -> int:
    """0 if none fit."""
    across = 4 * _columns_of_a_block(columns, c)
    if rows > 1:
        return rows if rows * across <= _BLOCK else 0
    return max((n for n in sizes(-(-r // 32) * 32, 512, 32) if n * across <= _BLOCK), default=0)


def _row_kernel(x, values, scales, *, n_rows, columns, scale_of):
    def strip(i, _):
        rows = pl.ds(pl.multiple_of(i * 32, 32), 32)
        for tile, at in enumerate(slices(x.shape[1], columns)):
            values[rows, at], scales[rows, tile : tile + 1] = _quantised(x[rows, at], (1,), scale_of)

    lax.fori_loop(0, x.shape[0] // 32, strip, None)


def _tile_kernel(x, values, scales, *, n_rows, columns, scale_of):
    left = n_rows - pl.program_id(0) * x.shape[0]

    def put(at, tile, axes):
        block = x[:, at]
        inside = lax.broadcasted_iota(jnp.int32, block.shape, 0) < left
        values[:, at], scales[:, tile] = _quantised(jnp.where(inside, block, 0), axes, scale_of)

    if columns > 1:
        for tile, at in enumerate(slices(x.shape[1], columns)):
            put(at, slice(tile, tile + 1), (0, 1))
        return

    def strip(i, _):
        at = pl.ds(pl.multiple_of(i * _STRIP, _STRIP), _STRIP)
        put(at, at, (0,))

    n = x.shape[1]
    lax.fori_loop(0, n // _STRIP, strip, None)
    if n % _STRIP:
        at = slice(n - n % _STRIP, n)
        put(at, at, (0,))


def _quantised(x, axes, scale_of):
    """x in E4M3 and its scale, where the values along these axes share one."""
    x = x.astype(jnp.float32)
    finite = jnp.abs(x) < jnp.inf
    scale = scale_of(jnp.max(jnp.where(finite, jnp.abs(x), 0), axis=axes, keepdims=True))
    return (jnp.where(finite, x, jnp.nan) * (1 / scale)).astype(jnp.float8_e4m3fn), scale
