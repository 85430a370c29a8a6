"""The FP8 format of released checkpoints: e4m3 values with one scale for each block of 128 x 128 (reference 5.3).

`weight_scale_inv` is what the values are multiplied by, despite its name. Blocks at the edges are smaller.
"""

import ml_dtypes
import numpy as np

BLOCK = 128
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST = 448.0  # of e4m3
SUFFIX = "_scale_inv"


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Blocks of a matrix along each dimension."""
    return tuple(-(-n // BLOCK) for n in shape)


def dequantise(values: np.ndarray, scale: np.ndarray, at: tuple[int, int] = (0, 0)) -> np.ndarray:
    """float32 values of a part of a matrix that begins at row and column `at`; `scale` holds the part's own blocks."""
    return values.astype(np.float32) * _spread(scale, values.shape, at)


def blocks_of(part: slice) -> slice:
    """The blocks that a range of rows or columns touches."""
    return slice(part.start // BLOCK, -(-part.stop // BLOCK))


def quantise(weights: np.ndarray, ue8m0: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(e4m3 values, float32 scales) of a float32 matrix: a block's largest value becomes 448.

    With ue8m0 the scale is the next power of two. A block of zeros has the scale 1.
    """
    largest = _block_max(np.abs(weights))
    scale = np.where(largest > 0, largest * np.float32(1 / LARGEST), np.float32(1)).astype(np.float32)
    if ue8m0:
        scale = np.exp2(np.ceil(np.log2(scale))).astype(np.float32)
    return _round(weights, scale), scale


def requantise(weights: np.ndarray, kept: np.ndarray, ue8m0: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """As quantise, but a block that is just what e4m3 values times its kept scale give has those values and that scale.

    weights: as dequantised, float32 or rounded to bfloat16. kept: float32 scales of its blocks.
    """
    values = _round(weights.astype(np.float32), kept)
    same = dequantise(values, kept).astype(weights.dtype) == weights
    trained = _block_max(~same)
    if not trained.any():
        return values, kept
    fresh, scale = quantise(weights.astype(np.float32), ue8m0)
    chosen = np.where(_spread(trained, weights.shape), fresh.view(np.uint8), values.view(np.uint8)).view(E4M3)
    return chosen, np.where(trained, scale, kept)


def _round(weights: np.ndarray, scale: np.ndarray) -> np.ndarray:
    by = _spread(scale, weights.shape)
    inverse = np.divide(np.float32(1), by, out=np.zeros_like(by), where=by != 0)
    return np.clip(weights * inverse, -LARGEST, LARGEST).astype(E4M3)


def _spread(scale: np.ndarray, shape: tuple[int, ...], at: tuple[int, int] = (0, 0)) -> np.ndarray:
    """A block's number at each of its elements."""
    for axis, (n, start) in enumerate(zip(shape, at)):
        skip = start % BLOCK
        scale = np.repeat(scale, BLOCK, axis).take(np.arange(skip, skip + n), axis)
    return scale


def _block_max(a: np.ndarray) -> np.ndarray:
    for axis, n in enumerate(a.shape):
        a = np.maximum.reduceat(a, np.arange(0, n, BLOCK), axis)
    return a
