"""Products of FP8 matrices for TPUs, in Pallas: those of scaled_matmul.py, whose definitions hold.

They walk over groups as the kernels of grouped_matmul_tpu.py do. Where the matrix unit multiplies E4M3 and blocks are
long enough for the vector unit to scale each block's product in the time of the next, operands are multiplied as they
come: "emulated" is what is computed. Elsewhere FP8 is how they lie in memory, and half of what is read: times their
scales, rounded to bfloat16, they are multiplied as such, which is "dequantised". A group's weights are so converted
once, when its first rows come, rows along with each product. Found by compiling (reference, kernels section 1.3).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels import grouped_matmul_tpu as unscaled
from pallas_kernels.grouped_matmul_tpu import Tiles, padded, sizes, slices, walk, whole_parts
from pallas_kernels.quantise import Quantised, length, spread


class Chip(NamedTuple):
    """What a chip can do with E4M3."""

    shortest: int | None  # block of values summed over that it multiplies in less time as E4M3 than as bfloat16
    converts: bool  # to float32, in one instruction


CHIPS = {"7x": Chip(512, True)}  # by JAX's name of the version
_OTHERS = Chip(None, False)
_CHUNK = 128  # rows of weights converted at a time
_HEIGHT = 256  # rows of a result that is scaled block by block at a time: what the compiler schedules best
_OVER_ROWS = ((0,), (0,)), ((), ())
_UNIT = 16.0  # of what chips that do not convert E4M3 read as it


def pallas_matmul(
    x: Quantised,
    w: Quantised,
    group_sizes: Int[Array, "E"] | None,
    transposed: bool,
    dtype,
    *,
    chip: Chip | None = None,
    tiles: Tiles | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "M N"]:
    """As `scaled_matmul`. chip: the one that runs it, if not given; without a TPU, one that multiplies all as E4M3.

    interpret: as for `grouped_matmul_tpu.pallas_tpu`. Raises ValueError for tiles of another length along K than a
    multiple of 128 or all of it, and if no tile of the operands fits the chip's memory.
    """
    (m, k), n = x.values.shape, w.values.shape[-2 if transposed else -1]
    if 0 in (m, k, n):
        return jnp.zeros((m, n), dtype)
    size = _block(length(x.tile.columns, k), k, "K")
    chip = chip or this_chip()
    native = _native(chip, size, k)
    tiles = tiles or choose_tiles(m, k, n, jnp.dtype(dtype).itemsize, native)
    values, scales = (w.values, w.scales) if group_sizes is not None else (w.values[None], w.scales[None])
    group_sizes = jnp.full(1, m, jnp.int32) if group_sizes is None else group_sizes.astype(jnp.int32)
    x_scales = spread(x.scales.T, x.tile.rows, m).T  # [M, blocks]
    if not (native or chip.converts):
        x_scales, scales = x_scales * _UNIT, scales * _UNIT
    scales = jnp.swapaxes(scales, 1, 2) if transposed else scales
    scales = spread(scales, w.tile.rows if transposed else w.tile.columns, n)  # [E, blocks, N]
    scales_transposed = transposed and not native  # to multiply weights as they lie
    if scales_transposed:
        scales = jnp.swapaxes(scales, 1, 2)
    n_groups, plan = group_sizes.shape[0], walk(group_sizes, m, tiles.rows, empty=False)

    def of_rows(size):
        return pl.BlockSpec((tiles.rows, size), lambda j, s, starts, group, tile, read: (read[s], 0))

    def of_weights(size, transposed):
        def at(j, s, starts, group, tile, read):
            expert = jnp.minimum(group[s], n_groups - 1)
            return (expert, j, 0) if transposed else (expert, 0, j)

        shape = (tiles.columns, size) if transposed else (size, tiles.columns)
        return pl.BlockSpec((pl.squeezed, *shape), at)

    blocks, copy = x_scales.shape[1], (tiles.columns, k) if transposed else (k, tiles.columns)
    kernel = _native_matmul_kernel if native else functools.partial(_converting_matmul_kernel, converts=chip.converts)
    result = jax.ShapeDtypeStruct((m, n), dtype)
    return pl.pallas_call(
        functools.partial(kernel, n_groups=n_groups, size=size, transposed=transposed),
        out_shape=result,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(pl.cdiv(n, tiles.columns), plan.n_steps),
            in_specs=[
                of_rows(k),
                of_rows(blocks),
                of_weights(k, transposed),
                of_weights(blocks, scales_transposed),
            ],
            out_specs=pl.BlockSpec((tiles.rows, tiles.columns), lambda j, s, starts, group, tile, read: (tile[s], j)),
            scratch_shapes=[] if native else [pltpu.VMEM(copy, jnp.bfloat16)],
        ),
        compiler_params=unscaled.parameters("parallel", "arbitrary"),
        cost_estimate=unscaled.cost(m, k, n, x.values, values, result),
        interpret=interpret,
        name=f"scaled_matmul{'_transposed' if transposed else ''}{'' if native else '_bfloat16'}",
    )(*plan[:4], x.values, x_scales, values, scales)


def pallas_gradient(
    x: Quantised,
    dy: Quantised,
    group_sizes: Int[Array, "E"] | None,
    dtype,
    *,
    chip: Chip | None = None,
    tiles: Tiles | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "*E K N"]:
    """As `scaled_gradient`; otherwise as `pallas_matmul`, but for the tiles, which are of rows.

    tiles.rows must divide the rows of the operands' tiles, or be a multiple of them.
    """
    (m, k), n = x.values.shape, dy.values.shape[1]
    dense = group_sizes is None
    group_sizes = jnp.full(1, m, jnp.int32) if dense else group_sizes.astype(jnp.int32)
    n_groups = group_sizes.shape[0]
    if 0 in (m, k, n):
        return jnp.zeros((k, n) if dense else (n_groups, k, n), dtype)
    size = _block(length(x.tile.rows, m), m, "M")
    chip = chip or this_chip()
    native = _native(chip, size, m)
    tiles = tiles or choose_gradient_tiles(m, k, n, jnp.dtype(dtype).itemsize, native, size)
    plan = walk(group_sizes, m, tiles.rows, empty=True)
    size = size if size < m else pl.cdiv(m, tiles.rows) * tiles.rows
    beside = max(1, tiles.rows // size)  # scales of a column in a tile

    def by_tile(a: Quantised, n: int):
        scales = spread(a.scales, a.tile.columns, n) * (1.0 if native or chip.converts else _UNIT)
        scales = jnp.pad(scales, ((0, -scales.shape[0] % beside), (0, 0)))
        return scales.reshape(-1, beside, n)

    def rows(columns, axis):
        return pl.BlockSpec((tiles.rows, columns), lambda *at: (at[-1][at[2]], at[axis]))

    def scales(columns, axis):
        return pl.BlockSpec(
            (pl.squeezed, beside, columns), lambda *at: (at[-1][at[2]] * tiles.rows // (size * beside), 0, at[axis])
        )

    kernel = (
        _native_gradient_kernel if native else functools.partial(_converting_gradient_kernel, converts=chip.converts)
    )
    result = jax.ShapeDtypeStruct((n_groups, k, n), dtype)
    dw = pl.pallas_call(
        functools.partial(kernel, size=size),
        out_shape=result,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(pl.cdiv(k, tiles.depth), pl.cdiv(n, tiles.columns), plan.n_steps),
            in_specs=[rows(tiles.depth, 0), scales(tiles.depth, 0), rows(tiles.columns, 1), scales(tiles.columns, 1)],
            out_specs=pl.BlockSpec(
                (pl.squeezed, tiles.depth, tiles.columns),
                lambda i, j, s, starts, group, tile: (group[s], i, j),
            ),
            scratch_shapes=[pltpu.VMEM((tiles.depth, tiles.columns), jnp.float32)],
        ),
        compiler_params=unscaled.parameters("parallel", "parallel", "arbitrary"),
        cost_estimate=unscaled.cost(m, k, n, x.values, dy.values, result),
        interpret=interpret,
        name=f"scaled_matmul_gradient{'' if native else '_bfloat16'}",
    )(*plan[:3], x.values, by_tile(x, k), dy.values, by_tile(dy, n))
    return dw[0] if dense else dw


def this_chip() -> Chip:
    """The chip compiled for."""
    if not pltpu.is_tpu_device():
        return Chip(0, True)
    return CHIPS.get(pltpu.get_tpu_info().chip_version.value, _OTHERS)


def _native(chip: Chip, size: int, n: int) -> bool:
    """Whether the chip is to multiply as E4M3 what is summed over n values in blocks of `size`."""
    return chip.shortest is not None and size >= min(chip.shortest, n)


def choose_tiles(m: int, k: int, n: int, itemsize: int, native: bool) -> Tiles:
    """As for bfloat16. Rows are converted once for each block of columns, which are therefore to be many."""
    held = 2 if native else 4  # bytes of an operand's element, with the next tile's and in bfloat16

    def time(rows, columns):
        moved = unscaled.BALANCE / 2 * (1 / columns + 1 / k)
        return (max(1.0, moved) + 0.03 * 512 / rows + (0 if native else 0.2 * 512 / columns)) * padded(n, columns)

    candidates = [
        (time(rows, columns), Tiles(rows, columns))
        for rows in sizes(whole_parts(m), 512, 32)
        for columns in sizes(n, 2048, 128)
        if held * k * (rows + columns) + (2 * itemsize + 4 + 4 * native) * rows * columns
        <= unscaled.USED * unscaled.VMEM_BYTES
    ]
    if not candidates:
        raise ValueError(
            f"scaled matmul: no tile of [{m}, {k}] x [{k}, {n}] fits {unscaled.VMEM_BYTES >> 20} MiB of VMEM"
        )
    return min(candidates)[1]


def choose_gradient_tiles(m: int, k: int, n: int, itemsize: int, native: bool, size: int) -> Tiles:
    """As for bfloat16, of rows that fit tiles of `size` rows."""
    held = 2 if native else 4
    candidates = [
        ((1 / depth + 1 / columns) * padded(k, depth) * padded(n, columns), -rows, Tiles(rows, columns, depth))
        for rows in sizes(whole_parts(m), 512, 32)
        for depth in sizes(k, 2048, 128)
        for columns in sizes(n, 2048, 128)
        if held * rows * (depth + columns) + (2 * itemsize + 8) * depth * columns <= unscaled.USED * unscaled.VMEM_BYTES
        and (size >= m or size % rows == 0 or rows % size == 0)
    ]
    return min(candidates)[2]


def _block(size: int, n: int, axis: str) -> int:
    """Length of the tiles along an axis of n values, n where there is but one."""
    if size < n and size % unscaled.EDGE:
        expected = f"a multiple of {unscaled.EDGE}"
        raise ValueError(f"scaled matmul on TPUs: tiles of {size} values along {axis}={n}; expected {expected}")
    return min(size, n)


def _native_matmul_kernel(starts, group, tile, read, x, x_scales, w, w_scales, y, *, n_groups, size, transposed):
    step = pl.program_id(1)
    begin, end = unscaled.own_rows(starts, group[step], tile[step], y.shape[0])
    contract = ((1,), (1 if transposed else 0,)), ((), ())

    def values(rows, columns):
        total = None
        for b, at in enumerate(slices(x.shape[1], size)):
            block = unscaled.product(x[rows, at], w[columns, at] if transposed else w[at, columns], contract)
            block = block * x_scales[rows, b : b + 1] * w_scales[b : b + 1, columns]
            total = block if total is None else total + block
        return (total,)

    strips = functools.partial(unscaled.in_strips, k=x.shape[1], n=y.shape[1], height=_HEIGHT)
    unscaled.write((y,), values, group[step] < n_groups, begin, end, strips)


def _converting_matmul_kernel(
    starts, group, tile, read, x, x_scales, w, w_scales, y, weights, *, n_groups, size, transposed, converts
):
    step = pl.program_id(1)
    mine = group[step]
    begin, end = unscaled.own_rows(starts, mine, tile[step], y.shape[0])
    contract = ((1,), (1 if transposed else 0,)), ((), ())

    @pl.when((mine < n_groups) & ((step == 0) | (group[jnp.maximum(step - 1, 0)] != mine)))
    def _():
        def convert(rows):
            if transposed:
                weights[rows] = _scaled(w[rows], w_scales[rows], size, converts)
            else:
                scales = w_scales[pl.ds(rows.start // size, 1)]
                weights[rows] = (_float32(w[rows], converts) * scales).astype(jnp.bfloat16)

        _in_chunks(w.shape[0], min(_CHUNK, 32 if transposed else size), convert)

    def values(rows, columns):
        x_rows = _scaled(x[rows], x_scales[rows], size, converts)
        return (unscaled.product(x_rows, weights[columns] if transposed else weights[:, columns], contract),)

    strips = functools.partial(unscaled.in_strips, k=x.shape[1], n=y.shape[1], elements=2 * unscaled.STRIP)
    unscaled.write((y,), values, mine < n_groups, begin, end, strips)


def _native_gradient_kernel(starts, group, tile, x, x_scales, dy, dy_scales, dw, total, *, size):
    depth, width = unscaled.largest(total.shape[0], 512), unscaled.largest(total.shape[1], 1024)

    def add(rows, own):
        def strip(i, _):
            n = total.shape[1] // width
            down = pl.ds(pl.multiple_of(lax.div(i, n) * depth, depth), depth)
            across = pl.ds(pl.multiple_of(lax.rem(i, n) * width, width), width)
            added = total[down, across]
            for at, scale in _rows_by_scale(rows, size, x_scales.shape[0]):
                both = x[at, down], dy[at, across]
                if own is not None:
                    both = (jnp.where(own(at), a.astype(jnp.float32), 0).astype(a.dtype) for a in both)
                column = jnp.broadcast_to(x_scales[scale, down], (8, depth)).T[:, :1]
                added += unscaled.product(*both, _OVER_ROWS) * column * dy_scales[scale, across]
            total[down, across] = added

        lax.fori_loop(0, total.shape[0] // depth * (total.shape[1] // width), strip, None)

    unscaled.sum_rows(starts, group, tile, x.shape[0], dw, total, add, x.shape[0])


def _converting_gradient_kernel(starts, group, tile, x, x_scales, dy, dy_scales, dw, total, *, size, converts):
    def add(rows, own):
        def converted(values, scales):
            by_scale = _rows_by_scale(rows, size, scales.shape[0])
            values = jnp.concatenate([_float32(values[at], converts) * scales[scale] for at, scale in by_scale])
            return (values if own is None else jnp.where(own(rows), values, 0)).astype(jnp.bfloat16)

        total[...] += unscaled.product(converted(x, x_scales), converted(dy, dy_scales), _OVER_ROWS)

    unscaled.sum_rows(starts, group, tile, x.shape[0], dw, total, add, x.shape[0])


def _rows_by_scale(rows, size: int, n_scales: int):
    """(those of a tile's rows that share scales, the row of these), of n_scales, one for every `size` rows."""
    step = min(size, rows.size)
    for i in range(rows.size // step):
        at = pl.ds(rows.start + i * step, step)
        yield at, pl.ds(at.start // size if n_scales > 1 else 0, 1)


def _in_chunks(n: int, size: int, f) -> None:
    """f(rows) for n rows, so many at a time."""
    lax.fori_loop(0, n // size, lambda i, _: f(pl.ds(pl.multiple_of(i * size, size), size)), None)
    if n % size:
        f(pl.ds(n - n % size, n % size))


def _scaled(values, scales, size: int, converts: bool):
    """Values [rows, n], with a scale for every `size` of a row, in bfloat16."""
    values = _float32(values, converts)
    blocks = [values[:, at] * scales[:, b : b + 1] for b, at in enumerate(slices(values.shape[1], size))]
    return jnp.concatenate([block.astype(jnp.bfloat16) for block in blocks], axis=1)


def _float32(values, converts: bool):
    """E4M3 in float32; over _UNIT on chips that have an instruction for E4M3B11FNUZ alone.

    This is E4M3 with exponents less by 4, and NaN where that has its minus zero. So here minus zeros are made zeros,
    and NaN what it is there, four values at a time.
    """
    if converts:
        return values.astype(jnp.float32)
    if values.shape[0] % 32:
        return values.astype(jnp.float32) / _UNIT
    four = pltpu.bitcast(values, jnp.int32)
    size = four & _bytes(0x7F)
    four &= (size + _bytes(0x7F)) | _bytes(0x7F)  # the sign stays where the size is not zero
    nan = (size + _bytes(0x01)) & _bytes(0x80)
    four = (four ^ (nan - lax.shift_right_logical(nan, 7))) | nan
    return pltpu.bitcast(four, jnp.float8_e4m3b11fnuz).astype(jnp.float32)


def _bytes(value: int) -> int:
    """An int32 of which each byte is this."""
    return int.from_bytes(bytes([value] * 4), "big", signed=True)
