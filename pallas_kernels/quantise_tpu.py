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
_BLOCK = VMEM_BYTES // 6  # bytes of the operands, in float32, in a block, at most; V3 has matrices 18,432 wide


def takes(rows: int, columns: int, shape: tuple[int, ...], n_operands: int = 1) -> bool:
    """Whether there is a kernel for tiles of rows x columns of a matrix of this shape, made of so many others: not if
    they are too large, or neither one nor all nor a multiple of 128 of its values."""
    *_, r, c = shape
    whole = all(n in (1, size) or n % 128 == 0 for n, size in ((rows, r), (columns, c)))
    fits = _rows_of_a_block(rows, columns, r, c, n_operands) > 0
    return whole and 0 not in shape and (rows, columns) != (1, 1) and fits


def pallas_tpu(
    operands: tuple[Float[Array, "R _C"], ...],
    rows: int,
    columns: int,
    scale_of: Callable,
    of: Callable = lambda x: (x,),
    *,
    interpret: bool | pltpu.InterpretParams = False,
) -> list[tuple[Float[Array, "R C"], Float[Array, "Tr Tc"]]]:
    """(values, scales) of each [R, C] that `of` makes of the operands element by element, in tiles that a kernel takes.

    The first operand is [R, C], others may be [R, 1]. scale_of(largest absolute values) gives the tiles' scales.
    """
    r, c = operands[0].shape
    across = _columns_of_a_block(columns, c)
    down = _rows_of_a_block(rows, columns, r, c, len(operands))
    n_rows, n_columns = down // rows, across if columns == 1 else pl.cdiv(c, columns)
    n_results = len(jax.eval_shape(of, *operands))
    one = (
        jax.ShapeDtypeStruct((r, c), jnp.float8_e4m3fn),
        jax.ShapeDtypeStruct((pl.cdiv(r, down), n_rows, c if columns == 1 else n_columns), jnp.float32),
    )
    whole = pl.BlockSpec((down, across), lambda i, j: (i, j))
    by_row = pl.BlockSpec((down, 1), lambda i, j: (i, 0))
    results = pl.pallas_call(
        functools.partial(
            _row_kernel if rows == 1 else _tile_kernel,
            n_operands=len(operands),
            n_rows=r,
            columns=columns,
            of=of,
            scale_of=scale_of,
        ),
        out_shape=one * n_results,
        grid=(pl.cdiv(r, down), pl.cdiv(c, across)),
        in_specs=[whole if x.shape[1] == c else by_row for x in operands],
        out_specs=(whole, pl.BlockSpec((pl.squeezed, n_rows, n_columns), lambda i, j: (i, 0, j))) * n_results,
        compiler_params=parameters("parallel", "parallel"),
        cost_estimate=pl.CostEstimate(
            flops=4 * n_results * r * c,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in operands) + n_results * r * c,
            transcendentals=0,
        ),
        interpret=interpret,
        name="quantise",
    )(*operands)
    return [(values, scales.reshape(-1, scales.shape[-1])[: pl.cdiv(r, rows)]) for values, scales in _in_pairs(results)]


def _in_pairs(results):
    return list(zip(results[::2], results[1::2]))


def _columns_of_a_block(columns: int, c: int) -> int:
    """All, where tiles lie along them; else as many as make long reads."""
    return c if columns > 1 else largest(-(-c // 128) * 128, 1024) if c > 1024 else c


def _rows_of_a_block(rows: int, columns: int, r: int, c: int, n_operands: int) -> int:
    """0 if none fit."""
    across = 4 * n_operands * _columns_of_a_block(columns, c)
    if rows > 1:
        return rows if rows * across <= _BLOCK else 0
    return max((n for n in sizes(-(-r // 32) * 32, 512, 32) if n * across <= _BLOCK), default=0)


def _row_kernel(*refs, n_operands, n_rows, columns, of, scale_of):
    operands, results = refs[:n_operands], _in_pairs(refs[n_operands:])

    def strip(i, _):
        rows = pl.ds(pl.multiple_of(i * 32, 32), 32)
        for tile, at in enumerate(slices(operands[0].shape[1], columns)):
            for x, (values, scales) in zip(of(*_parts(operands, rows, at)), results):
                values[rows, at], scales[rows, tile : tile + 1] = _quantised(x, (1,), scale_of)

    lax.fori_loop(0, operands[0].shape[0] // 32, strip, None)


def _tile_kernel(*refs, n_operands, n_rows, columns, of, scale_of):
    operands, results = refs[:n_operands], _in_pairs(refs[n_operands:])
    down, across = operands[0].shape
    left = n_rows - pl.program_id(0) * down

    def put(at, tile, axes):
        for x, (values, scales) in zip(of(*_parts(operands, slice(None), at)), results):
            inside = lax.broadcasted_iota(jnp.int32, x.shape, 0) < left
            values[:, at], scales[:, tile] = _quantised(jnp.where(inside, x, 0), axes, scale_of)

    if columns > 1:
        for tile, at in enumerate(slices(across, columns)):
            put(at, slice(tile, tile + 1), (0, 1))
        return

    def strip(i, _):
        at = pl.ds(pl.multiple_of(i * _STRIP, _STRIP), _STRIP)
        put(at, at, (0,))

    lax.fori_loop(0, across // _STRIP, strip, None)
    if across % _STRIP:
        at = slice(across - across % _STRIP, across)
        put(at, at, (0,))


def _parts(operands, rows, at):
    return [ref[rows, at] if ref.shape[1] == operands[0].shape[1] else ref[rows, :] for ref in operands]


def _quantised(x, axes, scale_of):
    """x in E4M3 and its scale, where the values along these axes share one."""
    x = x.astype(jnp.float32)
    finite = jnp.abs(x) < jnp.inf
    scale = scale_of(jnp.max(jnp.where(finite, jnp.abs(x), 0), axis=axes, keepdims=True))
    return (jnp.where(finite, x, jnp.nan) * (1 / scale)).astype(jnp.float8_e4m3fn), scale
