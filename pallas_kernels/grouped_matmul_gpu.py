"""Grouped matmul for Hopper GPUs, in Pallas for Mosaic GPU (JAX 0.11 and later): rows times their expert's weights, or
times their transpose, and the gradient of the weights.

A block of threads for each multiprocessor takes one tile of the result after the other. In it a warpgroup copies tiles
of the operands to shared memory, some steps ahead, and two others multiply them, 64 rows each. Groups begin at
multiples of 128 rows, so that a tile is of one expert; where they do not, rows are first copied to where they do. Found
by compiling prototypes (reference, kernels section 3.5).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

ROWS = 128  # of a tile, which two warpgroups share
ALIGNMENT = ROWS
HALF = ROWS // 2
_DEPTH = 64  # of bfloat16 values: one row of 128 bytes, as the tensor core reads shared memory
STAGES = 4  # steps that copies run ahead
_SWIZZLE = 128  # bytes
_MEMORY_REGISTERS = 40  # of the warpgroup that copies


class Aligned(NamedTuple):
    """Rows of x moved to where groups begin at multiples of ROWS, and back."""

    source: jax.Array  # [M'] int32, the row at each place; M for none
    place: jax.Array  # [M] int32, where each row is; M' for a row in no group
    sizes: jax.Array  # [E] int32, of the groups with what fills them up


def pallas_gpu(
    x: Float[Array, "M K"],
    w: Float[Array, "E K N"],
    group_sizes: Int[Array, "E"],
    *,
    alignment: int = 1,
    interpret=False,
) -> Float[Array, "M N"]:
    """As `grouped_matmul`, whose definition holds; bfloat16, K and N multiples of 128.

    alignment: what all group sizes and M are multiples of; if not of 128, rows are copied first. interpret:
    InterpretGPUParams to run on any platform, slowly. Raises ValueError for what the kernels cannot do.
    """
    if reason := unsupported(x, w):
        raise ValueError(f"pallas_gpu: {reason}")
    if 0 in (x.shape[0], w.shape[0]):
        return jnp.zeros((x.shape[0], w.shape[2]), x.dtype)
    return _matmul(x, w, group_sizes.astype(jnp.int32), alignment % ALIGNMENT == 0, interpret)


def unsupported(x: Float[Array, "M K"], w: Float[Array, "E K N"]) -> str | None:
    """Why the kernels cannot multiply these, in words; None if they can."""
    if reason := too_old():
        return reason
    if not x.dtype == w.dtype == jnp.bfloat16:
        return f"multiplies bfloat16, not {x.dtype} and {w.dtype}"
    if x.shape[1] % 128 or w.shape[2] % 128:
        return f"K={x.shape[1]} and N={w.shape[2]} must be multiples of 128"
    return None


def too_old() -> str | None:
    """Why Mosaic GPU cannot be used at all, in words; None if it can."""
    return f"needs JAX 0.11 or later, this is {jax.__version__}" if jax.__version_info__ < (0, 11) else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _matmul(x, w, group_sizes, aligned, interpret):
    return _on_aligned(x, group_sizes, aligned, lambda x, sizes: _rows_times_weights(x, w, sizes, False, interpret))


def _forward(x, w, group_sizes, aligned, interpret):
    return _matmul(x, w, group_sizes, aligned, interpret), (x, w, group_sizes)


def _backward(aligned, interpret, residuals, dy):
    x, w, group_sizes = residuals
    dx = _on_aligned(dy, group_sizes, aligned, lambda dy, sizes: _rows_times_weights(dy, w, sizes, True, interpret))
    if not aligned:
        plan = align(group_sizes, x.shape[0])
        x, dy, group_sizes = gather(x, plan.source), gather(dy, plan.source), plan.sizes
    return dx, _rows_times_rows(x, dy, group_sizes, w.dtype, interpret), None


_matmul.defvjp(_forward, _backward)


def _on_aligned(x, group_sizes, aligned: bool, multiply):
    if aligned:
        return multiply(x, group_sizes)
    plan = align(group_sizes, x.shape[0])
    return gather(multiply(gather(x, plan.source), plan.sizes), plan.place)


def align(group_sizes: Int[Array, "E"], m: int) -> Aligned:
    """Where the m rows go."""
    size = -(-m // ROWS) * ROWS + group_sizes.shape[0] * ROWS
    sizes = -(-group_sizes // ROWS) * ROWS
    stops, new_stops = jnp.cumsum(group_sizes), jnp.cumsum(sizes)

    def moved(n, stops, starts, sizes, new_starts, n_new):  # places of n in the one layout to those in the other
        at = jnp.arange(n, dtype=jnp.int32)
        group = jnp.minimum(jnp.searchsorted(stops, at, side="right"), stops.shape[0] - 1)
        nth = at - starts[group]
        return jnp.where(nth < sizes[group], new_starts[group] + nth, n_new).astype(jnp.int32)

    starts, new_starts = stops - group_sizes, new_stops - sizes
    return Aligned(
        moved(size, new_stops, new_starts, group_sizes, starts, m),
        moved(m, stops, starts, group_sizes, new_starts, size),
        sizes,
    )


def gather(x: Float[Array, "M D"], rows: Int[Array, "R"]) -> Float[Array, "R D"]:
    """The rows of x; zeros for a number past the end."""
    return x.at[rows].get(mode="fill", fill_value=0)


def tile_experts(group_sizes: Int[Array, "E"], n_tiles: int) -> Int[Array, "T"]:
    """The expert of each tile of ROWS rows, -1 for a tile of no group."""
    first = ROWS * jnp.arange(n_tiles, dtype=jnp.int32)
    expert = jnp.searchsorted(jnp.cumsum(group_sizes), first, side="right").astype(jnp.int32)
    return jnp.where(expert < group_sizes.shape[0], expert, -1)


@functools.partial(jax.jit, static_argnums=(3, 4))  # each shape is lowered once, however often it comes
def _rows_times_weights(x, w, group_sizes, transposed: bool, interpret):
    """y[row] = x[row] @ w[group of row], or @ w[group of row].T; zeros where a row is in no group."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    (m, k), n = x.shape, w.shape[1 if transposed else 2]
    columns = 256 if n % 256 == 0 else 128
    n_tiles, n_blocks = m // ROWS, n // columns
    tiling = transforms(x.dtype)

    def kernel(experts, x, w, y):
        def pipeline(body, context):
            block = (columns, _DEPTH) if transposed else (_DEPTH, columns)
            return copied_ahead(
                plgpu,
                body,
                context,
                k // _DEPTH,
                plgpu.BlockSpec((ROWS, _DEPTH), lambda i: (0, i), transforms=tiling, delay_release=1),
                plgpu.BlockSpec(block, lambda i: (0, i) if transposed else (i, 0), transforms=tiling, delay_release=1),
            )

        @functools.partial(
            pl.run_scoped,
            buffers=pipeline(no_work, no_work).get_allocations(x, w.at[0]),
            out=slots(plgpu, y.dtype),
            collective_axes="warpgroup",
        )
        def _(buffers, out):
            half = lax.axis_index("warpgroup")

            @plgpu.nd_loop((n_tiles * n_blocks,), collective_axes="sm")
            def _(step):
                tile, block = plgpu.planar_snake(step.index[0], (n_tiles, n_blocks), 0, 8)
                expert = experts[tile]
                rows, where = pl.ds(tile * ROWS + half * HALF, HALF), block * columns

                @pl.when(expert >= 0)
                def _():
                    def context(run):
                        def multiply(total):
                            run(total)
                            write(plgpu, total[...].astype(y.dtype), out.at[half], y.at[rows], where)

                        pl.run_scoped(multiply, plgpu.ACC((HALF, columns), jnp.float32))

                    def body(_, x_tile, w_tile, total):
                        x_half = x_tile.at[pl.ds(half * HALF, HALF)]
                        plgpu.wgmma(total, x_half, w_tile.T if transposed else w_tile)
                        plgpu.wgmma_wait(1)
                        return total

                    own = pl.ds(where, columns)
                    weights = w.at[expert, own] if transposed else w.at[expert, :, own]
                    pipeline(body, context)(x.at[pl.ds(tile * ROWS, ROWS)], weights, allocations=buffers)

                @pl.when((expert < 0) & (half < 2))
                def _():
                    write(plgpu, zeros(plgpu, columns, y.dtype), out.at[half], y.at[rows], where)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return launch(plgpu, kernel, jax.ShapeDtypeStruct((m, n), x.dtype), interpret)(
        tile_experts(group_sizes, n_tiles), x, w
    )


@functools.partial(jax.jit, static_argnums=(3, 4))
def _rows_times_rows(x, dy, group_sizes, dtype, interpret):
    """dw[e] = x[rows of e].T @ dy[rows of e]."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    k, n, n_groups = x.shape[1], dy.shape[1], group_sizes.shape[0]
    columns = 256 if n % 256 == 0 else 128
    n_rows, n_blocks = k // ROWS, n // columns
    tiling = transforms(x.dtype)
    steps = group_sizes // _DEPTH
    firsts = jnp.cumsum(steps) - steps

    def kernel(firsts, steps, x, dy, dw):
        def pipeline(body, context, first=0, n_steps=STAGES, i=0, j=0):
            return copied_ahead(
                plgpu,
                body,
                context,
                n_steps,
                plgpu.BlockSpec((_DEPTH, ROWS), lambda s: (first + s, i), transforms=tiling, delay_release=1),
                plgpu.BlockSpec((_DEPTH, columns), lambda s: (first + s, j), transforms=tiling, delay_release=1),
            )

        @functools.partial(
            pl.run_scoped,
            buffers=pipeline(no_work, no_work).get_allocations(x, dy),
            out=slots(plgpu, dw.dtype),
            collective_axes="warpgroup",
        )
        def _(buffers, out):
            half = lax.axis_index("warpgroup")

            @plgpu.nd_loop((n_groups, n_rows * n_blocks), collective_axes="sm")
            def _(step):
                expert = step.index[0]
                i, j = plgpu.planar_snake(step.index[1], (n_rows, n_blocks), 0, 8)

                def context(run):
                    def multiply(total):
                        run(total)
                        rows = dw.at[expert, pl.ds(i * ROWS + half * HALF, HALF)]
                        write(plgpu, total[...].astype(dw.dtype), out.at[half], rows, j * columns)

                    pl.run_scoped(multiply, plgpu.ACC((HALF, columns), jnp.float32))

                def body(_, x_tile, dy_tile, total):
                    plgpu.wgmma(total, x_tile.at[:, pl.ds(half * HALF, HALF)].T, dy_tile)
                    plgpu.wgmma_wait(1)
                    return total

                pipeline(body, context, firsts[expert], steps[expert], i, j)(x, dy, allocations=buffers)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return launch(plgpu, kernel, jax.ShapeDtypeStruct((n_groups, k, n), dtype), interpret)(firsts, steps, x, dy)


def no_work(*_, **__):
    """In place of what does not matter to how much memory a pipeline needs."""


def copied_ahead(plgpu, body, context, n_steps, *in_specs, stages: int = STAGES):
    """A pipeline of n_steps, whose blocks one warpgroup copies while two run the body, within the context."""
    return plgpu.emit_pipeline_warp_specialized(
        body,
        grid=(n_steps,),
        memory_registers=_MEMORY_REGISTERS,
        wg_axis="warpgroup",
        num_compute_wgs=2,
        max_concurrent_steps=stages,
        compute_context=context,
        in_specs=in_specs,
    )


def zeros(plgpu, columns: int, dtype):
    """A warpgroup's rows of zeros, as the tensor core gives its results."""
    return plgpu.layout_cast(jnp.zeros((HALF, columns), dtype), plgpu.Layout.WGMMA)


def slots(plgpu, dtype):
    """Two places of shared memory for each of two warpgroups, for columns on their way out."""
    return plgpu.SMEM((2, 2, HALF, _SWIZZLE // jnp.dtype(dtype).itemsize), dtype, transforms=transforms(dtype))


def transforms(dtype, swizzle: int = _SWIZZLE) -> tuple:
    """How tiles lie in shared memory: rows of that many bytes, swizzled."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(swizzle)


def write(plgpu, values, slots, rows, first_column) -> None:
    """A warpgroup's values to columns of `rows`, by way of two slots of shared memory in turn."""
    width = slots.shape[-1]
    for i in range(values.shape[1] // width):
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        slots[i % 2] = values[:, i * width : (i + 1) * width]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(slots.at[i % 2], rows.at[:, pl.ds(first_column + i * width, width)])


def launch(plgpu, kernel, out_type, interpret, blocks: int | None = None, **options):
    """The kernel by that many blocks of threads along the axis "sm", if not given one on each multiprocessor.

    A block has two warpgroups that compute and one that copies. options: further ones of the compiler.
    """
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=(blocks or multiprocessors(interpret),),
        grid_names=("sm",),
        num_threads=3,
        thread_name="warpgroup",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True, **options
        ),
    )


def multiprocessors(interpret) -> int:
    """Of the GPU that is compiled for; interpreted, as few as can race."""
    if interpret:
        return 2
    if device := jax.sharding.get_abstract_mesh().abstract_device:  # compiling for one that is not here
        return device.num_cores
    return jax.devices()[0].core_count
