"""Grouped matmul for TPUs, in Pallas: rows times their expert's weights, or times their transpose, and the gradient of
the weights.

A kernel walks over the tiles of rows, group after group; a tile in which groups meet is visited once for each. All of K
is summed in one product, so that no partial sum leaves the matrix unit, and a group's weights stay on the chip while
its rows pass. Only where a group begins or ends inside a tile are rows masked, and there only those parts of the tile
are multiplied in which it has rows. Found by compiling prototypes (reference, kernels section 1).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

VMEM_BYTES = 64 << 20  # of a core of v5p and tpu7x; v5e and v6e have twice as much
USED = 0.75  # of it for the tiles: the rest is for what the compiler keeps beside them
BALANCE = 560  # FLOPs of bfloat16 a byte of HBM: v6e's, the highest of the four
EDGE = 128  # rows multiplied at once in a tile that groups share


STRIP = 1 << 22  # elements of a tile's weights that one piece of program multiplies; compiling takes longer with more


class Tiles(NamedTuple):
    """Sizes of what a kernel holds at a time."""

    rows: int
    columns: int  # of the result
    depth: int = 0  # rows of the result that is a gradient of weights


class Walk(NamedTuple):
    """Which group and which tile of rows each step visits."""

    starts: jax.Array  # [E + 2] int32, first row of each group, of the rest, and the number of rows
    group: jax.Array  # [S] int32; E is the rest: rows in no group
    tile: jax.Array  # [S] int32
    read: jax.Array  # [S] int32, the tile to read: the one before, where there is nothing to multiply
    n_steps: jax.Array  # [] int32


def pallas_tpu(
    x: Float[Array, "M K"],
    w: Float[Array, "E K N"],
    group_sizes: Int[Array, "E"],
    *,
    tiles: tuple[Tiles, Tiles, Tiles] | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "M N"]:
    """As `grouped_matmul`, whose definition holds. tiles: forward, gradient of x, gradient of w; chosen if not given.

    interpret: True to run as plain JAX, on any platform; InterpretParams to run as a TPU would, slowly. Raises
    ValueError if no tile of the operands fits the chip's memory.
    """
    if 0 in (*x.shape, *w.shape):
        return jnp.zeros((x.shape[0], w.shape[2]), x.dtype)
    if tiles is None:
        (m, k), n, size = x.shape, w.shape[2], x.dtype.itemsize
        tiles = choose_tiles(m, k, n, size), choose_tiles(m, n, k, size), choose_gradient_tiles(m, k, n, size)
    return _matmul(x, w, group_sizes.astype(jnp.int32), tiles, interpret)


def choose_tiles(m: int, k: int, n: int, itemsize: int, n_weights: int = 1, n_results: int = 1) -> Tiles:
    """The tiles of [m, k] x [k, n] that take the least time by a roofline, of those that fit: of the products with so
    many weights at once, of which so many results are made."""

    def time(rows, columns):  # 1 is that of the products; x is read for each block of columns, weights and results once
        moved = BALANCE * itemsize / 2 * (1 / columns + n_results / k) / n_weights
        return (max(1.0, moved) + 0.03 * 512 / rows) * padded(n, columns)

    candidates = [
        (time(rows, columns), Tiles(rows, columns))
        for rows in sizes(whole_parts(m), 512, 16)
        for columns in sizes(n, 2048, 128)
        if 2 * (rows * k + n_weights * k * columns + n_results * rows * columns) * itemsize
        + 4 * n_weights * rows * columns
        <= USED * VMEM_BYTES
    ]
    if not candidates:
        raise ValueError(f"grouped matmul: no tile of [{m}, {k}] x [{k}, {n}] fits {VMEM_BYTES >> 20} MiB of VMEM")
    return min(candidates)[1]


def choose_gradient_tiles(m: int, k: int, n: int, itemsize: int) -> Tiles:
    """The tiles of [m, k]T x [m, n] for which least is read, of those that fit."""
    candidates = [
        ((1 / depth + 1 / columns) * padded(k, depth) * padded(n, columns), -rows, Tiles(rows, columns, depth))
        for rows in sizes(whole_parts(m), 512, 16)
        for depth in sizes(k, 2048, 128)
        for columns in sizes(n, 2048, 128)
        if 2 * (rows * (depth + columns) + depth * columns) * itemsize + 8 * depth * columns <= USED * VMEM_BYTES
    ]
    return min(candidates)[2]


def padded(n: int, tile: int) -> float:
    """How many times n the tiles over it are."""
    return -(-n // tile) * tile / n


def whole_parts(m: int) -> int:
    part = EDGE if m > EDGE else 32  # 32 rows of any format fill whole registers
    return -(-m // part) * part


def sizes(n: int, most: int, least: int) -> list[int]:
    """Powers of two from `least` to `most` that are less than n; n itself too, if it is at most `most`."""
    powers = [1 << i for i in range(least.bit_length() - 1, most.bit_length())]
    return [size for size in powers if size < n] + ([n] if n <= most else [])


def slices(n: int, size: int) -> list[slice]:
    """Of an axis of n, `size` at a time, fewer at its end."""
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def walk(group_sizes: Int[Array, "E"], m: int, rows: int, empty: bool) -> Walk:
    """Of every group's tiles in order. empty: groups without rows are visited once, and the rows in no group never;
    otherwise the other way round."""
    n_groups, n_tiles = group_sizes.shape[0], -(-m // rows)
    stops = jnp.cumsum(group_sizes)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), stops, jnp.full(1, m, jnp.int32)])
    first, last = starts[:-1] // rows, -(-starts[1:] // rows)
    visits = jnp.where(starts[1:] > starts[:-1], last - first, 0)
    visits = jnp.maximum(visits, 1).at[-1].set(0) if empty else visits
    done = jnp.cumsum(visits)
    step = jnp.arange(n_tiles + n_groups + 1, dtype=jnp.int32)
    group = jnp.minimum(jnp.sum(step[:, None] >= done, axis=1, dtype=jnp.int32), n_groups)
    tile = jnp.clip(first[group] + step - (done - visits)[group], 0, n_tiles - 1)
    return Walk(starts, group, tile, jnp.minimum(tile, jnp.maximum(last[:-1].max() - 1, 0)), done[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _matmul(x, w, group_sizes, tiles, interpret):
    return _rows_times_weights(x, w, group_sizes, tiles[0], False, interpret)


def _forward(x, w, group_sizes, tiles, interpret):
    return _matmul(x, w, group_sizes, tiles, interpret), (x, w, group_sizes)


def _backward(tiles, interpret, residuals, dy):
    x, w, group_sizes = residuals
    dx = _rows_times_weights(dy, w, group_sizes, tiles[1], True, interpret)
    return dx, _rows_times_rows(x, dy, group_sizes, tiles[2], w.dtype, interpret), None


_matmul.defvjp(_forward, _backward)


def _rows_times_weights(x, w, group_sizes, tiles: Tiles, transposed: bool, interpret):
    """y[row] = x[row] @ w[group of row], or @ w[group of row].T; zeros where a row is in no group."""
    (m, k), n_groups, n = x.shape, w.shape[0], w.shape[1 if transposed else 2]
    plan = walk(group_sizes, m, tiles.rows, empty=False)

    def of_group(j, s, starts, group, tile, read):
        expert = jnp.minimum(group[s], n_groups - 1)
        return (expert, j, 0) if transposed else (expert, 0, j)

    result = jax.ShapeDtypeStruct((m, n), x.dtype)
    return pl.pallas_call(
        functools.partial(_rows_times_weights_kernel, n_groups=n_groups, transposed=transposed),
        out_shape=result,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(pl.cdiv(n, tiles.columns), plan.n_steps),
            in_specs=[
                pl.BlockSpec((tiles.rows, k), lambda j, s, starts, group, tile, read: (read[s], 0)),
                pl.BlockSpec(
                    (pl.squeezed, tiles.columns, k) if transposed else (pl.squeezed, k, tiles.columns), of_group
                ),
            ],
            out_specs=pl.BlockSpec((tiles.rows, tiles.columns), lambda j, s, starts, group, tile, read: (tile[s], j)),
        ),
        compiler_params=parameters("parallel", "arbitrary"),
        cost_estimate=cost(m, k, n, x, w, result),
        interpret=interpret,
        name="grouped_matmul_transposed" if transposed else "grouped_matmul",
    )(*plan[:4], x, w)


def _rows_times_weights_kernel(starts, group, tile, read, x, w, y, *, n_groups, transposed):
    step = pl.program_id(1)
    begin, end = own_rows(starts, group[step], tile[step], y.shape[0])

    def values(rows, columns):
        weights, contract = (
            (w[columns], (((1,), (1,)), ((), ()))) if transposed else (w[:, columns], (((1,), (0,)), ((), ())))
        )
        return (product(x[rows], weights, contract),)

    strips = functools.partial(in_strips, k=x.shape[1], n=y.shape[1])
    write((y,), values, group[step] < n_groups, begin, end, strips)


def write(results, values, multiplied, begin, end, strips) -> None:
    """Writes values(rows, columns), one for each result, for the group's rows of a tile, zeros if they are not
    multiplied, strip by strip."""

    def zeros(rows, columns):
        return (jnp.zeros((rows.size, columns.size), y.dtype) for y in results)

    def put(values, rows, columns):
        for y, new in zip(results, values(rows, columns)):
            y[rows, columns] = new.astype(y.dtype)

    def put_own(values, rows, columns):
        for y, new in zip(results, values(rows, columns)):
            y[rows, columns] = jnp.where(between(begin, end, rows), new.astype(y.dtype), y[rows, columns])

    for when, these in ((multiplied, values), (~multiplied, zeros)):
        whole, part = (strips(functools.partial(f, these)) for f in (put, put_own))
        by_parts(when, begin, end, results[0].shape[0], whole, part)


def in_strips(put, k: int, n: int, elements: int | None = None, height: int | None = None):
    """put(rows, columns) for strips one after the other: of so many `elements` of [k, n], and `height` rows at most."""

    def put_all(rows):
        width = largest(n, max(128, (elements or STRIP) // k))
        tall = largest(rows.size, height or rows.size)

        def put_one(i, _):
            column, row = lax.div(i, rows.size // tall), lax.rem(i, rows.size // tall)
            at = pl.ds(rows.start + pl.multiple_of(row * tall, tall), tall) if tall < rows.size else rows
            put(at, pl.ds(pl.multiple_of(column * width, width), width))

        lax.fori_loop(0, n // width * (rows.size // tall), put_one, None)

    return put_all


def largest(n: int, most: int) -> int:
    """The largest power of two from 128 to 2048 that is at most `most` and divides n; n if there is none."""
    return next((size for size in (2048, 1024, 512, 256, 128) if size <= most and n % size == 0), n)


def _rows_times_rows(x, dy, group_sizes, tiles: Tiles, dtype, interpret):
    """dw[e] = x[rows of e].T @ dy[rows of e]."""
    (m, k), n, n_groups = x.shape, dy.shape[1], group_sizes.shape[0]
    plan = walk(group_sizes, m, tiles.rows, empty=True)
    result = jax.ShapeDtypeStruct((n_groups, k, n), dtype)
    return pl.pallas_call(
        _rows_times_rows_kernel,
        out_shape=result,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(pl.cdiv(k, tiles.depth), pl.cdiv(n, tiles.columns), plan.n_steps),
            in_specs=[
                pl.BlockSpec((tiles.rows, tiles.depth), lambda i, j, s, starts, group, tile: (tile[s], i)),
                pl.BlockSpec((tiles.rows, tiles.columns), lambda i, j, s, starts, group, tile: (tile[s], j)),
            ],
            out_specs=pl.BlockSpec(
                (pl.squeezed, tiles.depth, tiles.columns),
                lambda i, j, s, starts, group, tile: (group[s], i, j),
            ),
            scratch_shapes=[pltpu.VMEM((tiles.depth, tiles.columns), jnp.float32)],
        ),
        compiler_params=parameters("parallel", "parallel", "arbitrary"),
        cost_estimate=cost(m, k, n, x, dy, result),
        interpret=interpret,
        name="grouped_matmul_gradient",
    )(*plan[:3], x, dy)


def _rows_times_rows_kernel(starts, group, tile, x, dy, dw, total):
    def add(rows, own):
        both = x[rows], dy[rows]
        if own is not None:
            both = (jnp.where(own(rows), a, jnp.zeros((), a.dtype)) for a in both)
        total[...] += product(*both, (((0,), (0,)), ((), ())))

    sum_rows(starts, group, tile, x.shape[0], dw, total, add)


def sum_rows(starts, group, tile, n_rows: int, dw, total, add, part: int | None = None) -> None:
    """Writes dw when a group's rows have passed: add(rows, own) adds to total those of which own(rows), all if None.

    part: rows added at once in a tile that groups share; EDGE if not given.
    """
    step, n_steps = pl.program_id(2), pl.num_programs(2)
    mine = group[step]
    begin, end = own_rows(starts, mine, tile[step], n_rows)

    @pl.when((step == 0) | (group[jnp.maximum(step - 1, 0)] != mine))
    def _():
        total[...] = jnp.zeros_like(total)

    def add_own(rows):
        add(rows, functools.partial(between, begin, end))

    by_parts(True, begin, end, n_rows, lambda rows: add(rows, None), add_own, part)

    @pl.when((step == n_steps - 1) | (group[jnp.minimum(step + 1, n_steps - 1)] != mine))
    def _():
        dw[...] = total[...].astype(dw.dtype)


def own_rows(starts, group, tile, rows: int):
    """Where in a tile the group's rows begin and end; beyond the tile, if it has more."""
    return starts[group] - tile * rows, starts[group + 1] - tile * rows


def between(begin, end, rows):
    place = rows.start + lax.broadcasted_iota(jnp.int32, (rows.size, 1), 0)
    return (place >= begin) & (place < end)


def by_parts(when, begin, end, n_rows: int, whole, part, size: int | None = None) -> None:
    """whole(rows) for a tile that is all the group's; else part(rows) for each `size` in which the group has rows."""
    all_own = (begin <= 0) & (end >= n_rows)
    pl.when(when & all_own)(lambda: whole(pl.ds(0, n_rows)))

    @pl.when(when & ~all_own)
    def _():
        n = min(size or EDGE, n_rows)
        first, stop = lax.div(jnp.maximum(begin, 0), n), lax.div(jnp.minimum(end, n_rows) + n - 1, n)
        lax.fori_loop(first, stop, lambda i, _: part(pl.ds(i * n, n)), None)


def product(a, b, contract):
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, contract, precision=exact, preferred_element_type=jnp.float32)


def parameters(*semantics):
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=int(0.95 * VMEM_BYTES))


def cost(m, k, n, *arrays):
    moved = sum(a.size * a.dtype.itemsize for a in arrays)
    return pl.CostEstimate(flops=2 * m * k * n, bytes_accessed=moved, transcendentals=0)
