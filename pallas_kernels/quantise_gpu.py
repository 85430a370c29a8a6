"""Quantisation for Hopper GPUs, in Pallas for Mosaic GPU (JAX 0.11 and later): one pass over a matrix, bit for bit the
definition in quantise.py.

A warpgroup takes a block of 128 x 128 values from memory to shared memory, from there to its registers, where it finds
the largest ones and scales, and back. XLA reads the matrix at least twice.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.grouped_matmul_gpu import too_old, transforms

_BLOCK, _HALF = 128, 64
_E4M3 = jnp.float8_e4m3fn
_TILES = (1, _BLOCK), (_BLOCK, 1), (_BLOCK, _BLOCK)


def unsupported(x: Float[Array, "*B R C"], rows: int | None, columns: int | None) -> str | None:
    """Why the kernel cannot quantise x in tiles of rows x columns, in words; None if it can."""
    if reason := too_old():
        return reason
    if (rows, columns) not in _TILES:
        return f"tiles {(rows, columns)}; expected {', '.join(map(str, _TILES))}"
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"quantises bfloat16 and float32, not {x.dtype}"
    if x.shape[-2] % 8 or x.shape[-1] % 32 or 0 in x.shape:
        return f"shape {x.shape}: expected multiples of 8 rows and of 32 columns"
    return None


def pallas_gpu(
    x: Float[Array, "*B R C"], rows: int | None, columns: int | None, scale_of: Callable, *, interpret=False
) -> tuple[Float[Array, "*B R C"], Float[Array, "*B Tr Tc"]]:
    """(values, scales) of tiles that the kernel takes; scale_of(largest absolute values) gives their scales.

    interpret: InterpretGPUParams to run on any platform, slowly. Raises ValueError for what the kernel cannot do.
    """
    if reason := unsupported(x, rows, columns):
        raise ValueError(f"pallas_gpu: {reason}")
    *batch, r, c = x.shape
    values, scales = _quantise(x.reshape(-1, r, c), rows, columns, scale_of, interpret)
    if rows == 1:
        scales = scales.swapaxes(1, 2)[:, :r]
    elif columns == 1:
        scales = scales[..., :c]
    else:
        scales = scale_of(scales)
    return values.reshape(x.shape), scales.reshape(*batch, *scales.shape[1:])


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))  # each shape is lowered once, however often it comes
def _quantise(x, rows: int, columns: int, scale_of: Callable, interpret):
    """Scales have whole blocks' places, and those of rows are [B, Tc, R]: what a block has of them lies together. Of
    tiles as large as a block it is their largest values, as a kernel cannot see a single number's bits.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def as_copied(dtype):  # in pieces that divide a row: the hardware copies no half ones
        return transforms(dtype, math.gcd(x.shape[2] * jnp.dtype(dtype).itemsize, 128))

    layout = plgpu.Layout.WGMMA
    b, n_down, n_across = x.shape[0], *(-(-n // _BLOCK) for n in x.shape[1:])

    def kernel(x, values, scales, block, quantised, copied):
        matrix, i, j = (lax.axis_index(name) for name in ("matrix", "down", "across"))
        down, across = pl.ds(i * _BLOCK, _BLOCK), pl.ds(j * _BLOCK, _BLOCK)

        def load(half):
            loaded = plgpu.layout_cast(block[half], layout).astype(jnp.float32)
            size = jnp.abs(loaded)
            return loaded, size, size < jnp.inf

        def find_largest(half, axis):
            _, size, finite = load(half)
            return jnp.max(jnp.where(finite, size, 0.0), axis=axis)

        def put(half, scale, axes):
            loaded, _, finite = load(half)
            factor = lax.broadcast_in_dim(1 / scale, loaded.shape, axes)
            # The conversion alone would make infinities 448.
            quantised[half] = (jnp.where(finite, loaded, jnp.nan) * factor).astype(_E4M3)

        plgpu.copy_gmem_to_smem(x.at[matrix, down, across], block, copied)
        plgpu.barrier_wait(copied)
        halves = [pl.ds(first, _HALF) for first in range(0, _BLOCK, _HALF)]  # a whole block takes too many registers
        if rows == 1:
            for half in halves:
                scale = scale_of(find_largest(half, 1))
                scales[matrix, j, pl.ds(i * _BLOCK + half.start, _HALF)] = scale
                put(half, scale, (0,))
        else:
            of_columns = jnp.maximum(*(find_largest(half, 0) for half in halves))
            if columns > 1:
                of_block = jnp.max(of_columns)
                scales[matrix, i, j] = of_block
                of_columns = lax.broadcast_in_dim(of_block, of_columns.shape, ())
            scale = scale_of(of_columns)
            if columns == 1:
                scales[matrix, i, across] = scale
            for half in halves:
                put(half, scale, (1,))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(quantised, values.at[matrix, down, across])
        plgpu.wait_smem_to_gmem(0)

    places = (n_across, n_down * _BLOCK) if rows == 1 else (n_down, n_across * _BLOCK // columns)
    return plgpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct(x.shape, _E4M3), jax.ShapeDtypeStruct((b, *places), jnp.float32)),
        grid=(b, n_down, n_across),
        grid_names=("matrix", "down", "across"),
        scratch_types=(
            plgpu.SMEM((_BLOCK, _BLOCK), x.dtype, transforms=as_copied(x.dtype)),
            plgpu.SMEM((_BLOCK, _BLOCK), _E4M3, transforms=as_copied(_E4M3)),
            plgpu.Barrier(),
        ),
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(x)
