"""Matrices in FP8: E4M3 values, and a float32 scale for every tile of them.

arXiv:2412.19437, section 3.3; reference section 5.2.

`quantise` is the public function and chooses by platform, `reference` its definition, `by_kernel` that for TPUs and
`by_gpu_kernel` that for Hopper GPUs.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import quantise_gpu, quantise_tpu
from pallas_kernels.choice import choose, warn_once

E4M3 = jnp.float8_e4m3fn
LARGEST = 448.0  # of E4M3
INVERSE = float(np.float32(1 / LARGEST))
# A tile whose largest value is less than this is scaled as if it were this, so that no scale is zero or subnormal. Not
# the 1e-4 of the released kernels: gradients of a loss that is a mean over a batch are smaller than that.
SMALLEST = 2.0**-100


class Tile(NamedTuple):
    """The values of a matrix that share a scale: `rows` x `columns` of them, None for all; smaller ones at the edges.

    ue8m0: the scale is a power of two, the next one up.
    """

    rows: int | None
    columns: int | None
    ue8m0: bool = False


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "scales"], meta_fields=["tile"])
@dataclass(frozen=True)
class Quantised:
    """A matrix, or a stack of them, in E4M3: value times scale is what they stand for.

    As a model's weight its rows or columns may be several dimensions; its scales are still those of the matrix.
    """

    values: Any  # [*B, R, C] float8_e4m3fn
    scales: Any  # [*B, ceil(R / tile.rows), ceil(C / tile.columns)] float32
    tile: Tile

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def __getitem__(self, index):
        return self if index is ... else jax.tree.map(lambda a: a[index], self)


def quantise(x: Float[Array, "*B R C"], tile: Tile, *, implementation: str = "auto") -> Quantised:
    """x in E4M3, each tile over its own scale: its largest absolute value over 448, so that this becomes 448.

    In float32: the scale is the largest value times 1/448, and values are multiplied by one over the scale. NaN and
    infinities become NaN, and count for no scale; zeros stay zeros. implementation: "auto" (by platform), "reference",
    "pallas_tpu", "pallas_interpret" (the same kernel on any platform) or "pallas_gpu"; any other name raises
    ValueError. What "pallas_gpu" cannot quantise goes to "reference", with a line in the log.
    """
    name = choose(implementation, IMPLEMENTATION_BY_PLATFORM, IMPLEMENTATIONS)
    return IMPLEMENTATIONS[name](x, tile)


def quantise_all(
    of: Callable, operands: tuple[Float[Array, "R _C"], ...], tile: Tile, *, implementation: str = "auto"
) -> list[Quantised]:
    """What `of` makes of the operands, element by element, each as `quantise` would: on TPUs in one pass over them.

    of(*operands) returns arrays [R, C]; the first operand is [R, C], others may be [R, 1]. Raises what `quantise` does.
    """
    name = choose(implementation, IMPLEMENTATION_BY_PLATFORM, IMPLEMENTATIONS)
    shape = operands[0].shape
    if name in ("pallas_tpu", "pallas_interpret") and quantise_tpu.takes(*_lengths(tile, shape), shape, len(operands)):
        return _kernel(operands, tile, of=of, interpret=name == "pallas_interpret")
    return [quantise(x, tile, implementation=name) for x in of(*operands)]


def dequantise(x: Quantised, dtype=jnp.float32) -> Float[Array, "*B R C"]:
    """The values that x stands for: their product with the scales in float32, rounded to dtype."""
    *_, r, c = x.values.shape
    by_tile = _tiles(x.values.astype(jnp.float32), x.tile) * x.scales[..., :, None, :, None]
    return _untiled(by_tile, r, c).astype(dtype)


def reference(x: Float[Array, "*B R C"], tile: Tile) -> Quantised:
    """The definition."""
    *_, r, c = x.shape
    by_tile = _tiles(x.astype(jnp.float32), tile)
    size = jnp.abs(by_tile)
    largest = jnp.max(jnp.where(size < jnp.inf, size, 0), axis=(-3, -1), keepdims=True)
    scales = _scaling(tile)(largest)
    values = _untiled((by_tile * (1 / scales)).astype(E4M3), r, c)
    return Quantised(values, scales[..., 0, :, 0], tile)


def by_kernel(x: Float[Array, "*B R C"], tile: Tile, interpret=False) -> Quantised:
    """As `reference`, in one pass over x, for tiles that the kernel takes; others by the definition."""
    if not quantise_tpu.takes(*_lengths(tile, x.shape), x.shape):
        return reference(x, tile)

    def one(x):
        return _kernel((x,), tile, interpret=interpret)[0]

    for _ in x.shape[:-2]:
        one = jax.vmap(one)
    return one(x)


def _kernel(operands, tile: Tile, **options) -> list[Quantised]:
    results = quantise_tpu.pallas_tpu(operands, *_lengths(tile, operands[0].shape), _scaling(tile), **options)
    return [Quantised(*result, tile) for result in results]


def _lengths(tile: Tile, shape: tuple[int, ...]) -> tuple[int, int]:
    return length(tile.rows, shape[-2]), length(tile.columns, shape[-1])


def by_gpu_kernel(x: Float[Array, "*B R C"], tile: Tile, interpret=False) -> Quantised:
    """As `reference`, in one pass over x, for what the kernel takes; the rest by the definition, which is logged.

    interpret: InterpretGPUParams to run on any platform, slowly.
    """
    if reason := quantise_gpu.unsupported(x, tile.rows, tile.columns):
        warn_once(f"quantisation by its definition, not by the kernel for GPUs: {reason}")
        return reference(x, tile)
    return Quantised(*quantise_gpu.pallas_gpu(x, *tile[:2], _scaling(tile), interpret=interpret), tile)


def scale_of(largest: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """The scale of tiles whose largest absolute values are given."""
    # Not a division: XLA makes one by a constant a product with its inverse on some platforms.
    return jnp.maximum(largest, SMALLEST) * INVERSE


def ue8m0_scale_of(largest: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """The same, or the next power of two."""
    bits = lax.bitcast_convert_type(scale_of(largest), jnp.uint32)
    return lax.bitcast_convert_type((bits + 0x7FFFFF) & jnp.uint32(0x7F800000), jnp.float32)  # the next exponent up


def _scaling(tile: Tile) -> Callable:
    return ue8m0_scale_of if tile.ue8m0 else scale_of


def length(size: int | None, n: int) -> int:
    """Of the tiles along an axis of n values, where `size` of them are to share a scale."""
    return n if size is None else max(1, min(size, n))


def spread(scales: Float[Array, "*B s"], size: int | None, n: int) -> Float[Array, "*B n"]:
    """Scales of tiles of `size` along the last axis, at each of n places."""
    return scales if size == 1 else jnp.repeat(scales, length(size, n), axis=-1)[..., :n]


def _tiles(x, tile: Tile):
    """[*B, R, C] as [*B, tiles, rows, tiles, columns], zeros added at the edges."""
    *batch, r, c = x.shape
    rows, columns = length(tile.rows, r), length(tile.columns, c)
    x = jnp.pad(x, [(0, 0)] * len(batch) + [(0, -r % rows), (0, -c % columns)])
    return x.reshape(*batch, -1, rows, x.shape[-1] // columns, columns)


def _untiled(x, r: int, c: int):
    *batch, a, rows, b, columns = x.shape
    return x.reshape(*batch, a * rows, b * columns)[..., :r, :c]


IMPLEMENTATIONS: dict[str, Callable] = {
    "reference": reference,
    "pallas_tpu": by_kernel,
    "pallas_interpret": functools.partial(by_kernel, interpret=True),
    "pallas_gpu": by_gpu_kernel,
}
IMPLEMENTATION_BY_PLATFORM = {"cpu": "reference", "tpu": "pallas_tpu", "gpu": "pallas_gpu"}
