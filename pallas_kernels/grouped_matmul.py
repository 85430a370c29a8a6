"""Grouped matmul: rows sorted by expert, each multiplied by its own expert's weights.

`grouped_matmul` is the public function, `reference` its definition, `tiles` the one that XLA:CPU runs fast.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

IMPLEMENTATION_BY_PLATFORM = {"cpu": "tiles", "tpu": "ragged_dot", "gpu": "ragged_dot"}
TILE_ROWS = 256


def grouped_matmul(
    x: Float[Array, "M K"],
    w: Float[Array, "E K N"],
    group_sizes: Int[Array, "E"],
    *,
    implementation: str = "auto",
) -> Float[Array, "M N"]:
    """Each row of x times the weights of its expert, summed in float32 and returned in the dtype of x.

    The first group_sizes[0] rows of x use w[0], the next group_sizes[1] rows w[1], and so on; groups may be empty and
    need no alignment. Rows after the last group (sum(group_sizes) <= M) give zeros, have zero gradient and are never
    looked at, so they may hold NaN. Differentiable in x and w.

    implementation: "auto" (by platform), "tiles", "ragged_dot" or "reference"; any other name raises ValueError.
    """
    if implementation == "auto":
        implementation = IMPLEMENTATION_BY_PLATFORM[jax.default_backend()]
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: choose one of {['auto', *IMPLEMENTATIONS]}")
    return IMPLEMENTATIONS[implementation](x, w, group_sizes)


def expert_of_row(group_sizes: Int[Array, "E"], num_rows: int) -> Int[Array, "M"]:
    """The expert of each row; E for the rows after the last group."""
    return jnp.sum(jnp.arange(num_rows)[:, None] >= jnp.cumsum(group_sizes), axis=1)


def reference(x: Float[Array, "M K"], w: Float[Array, "E K N"], group_sizes: Int[Array, "E"]) -> Float[Array, "M N"]:
    """The definition: every expert on the rows that are its own, E times the work."""
    expert = expert_of_row(group_sizes, x.shape[0])
    own = expert == jnp.arange(w.shape[0])[:, None]
    x_of_expert = jnp.where(own[:, :, None], x, 0)
    return jnp.einsum("emk,ekn->mn", x_of_expert, w, preferred_element_type=jnp.float32).astype(x.dtype)


def ragged_dot(x: Float[Array, "M K"], w: Float[Array, "E K N"], group_sizes: Int[Array, "E"]) -> Float[Array, "M N"]:
    """XLA's own grouped matmul, with the rows after the last group defined as zero."""
    in_a_group = (jnp.arange(x.shape[0]) < jnp.sum(group_sizes))[:, None]
    y = lax.ragged_dot(jnp.where(in_a_group, x, 0), w, group_sizes, preferred_element_type=jnp.float32)
    return jnp.where(in_a_group, y, 0).astype(x.dtype)


@jax.custom_vjp
def tiles(x: Float[Array, "M K"], w: Float[Array, "E K N"], group_sizes: Int[Array, "E"]) -> Float[Array, "M N"]:
    """A loop over the experts that have rows, and in it a loop over tiles of their rows: the work of the rows present."""
    return _rows_times_weights(x, w, group_sizes)


def _tiles_forward(x, w, group_sizes):
    return _rows_times_weights(x, w, group_sizes), (x, w, group_sizes)


def _tiles_backward(residuals, dy):
    x, w, group_sizes = residuals
    dx = _rows_times_weights(dy, w.swapaxes(1, 2), group_sizes)
    dw = _rows_times_rows(x, dy, group_sizes).astype(w.dtype)
    return dx, dw, None


tiles.defvjp(_tiles_forward, _tiles_backward)


def _fold_tiles(group_sizes: jax.Array, num_rows: int, begin: Callable, tile: Callable, end: Callable, carry):
    """Folds over experts with rows: end(carry, e, fold of tile over the expert's row tiles from begin(carry, e))."""
    tile_rows = min(TILE_ROWS, num_rows)
    stops = jnp.cumsum(group_sizes)
    present = jnp.nonzero(group_sizes, size=group_sizes.shape[0], fill_value=0)[0]

    def expert_body(i, carry):
        expert = present[i]
        stop = stops[expert]
        start = stop - group_sizes[expert]
        fixed, inner = begin(carry, expert)

        def tile_body(j, inner):
            # Near the last row the tile moves back over rows already done, which `own` then leaves out.
            wanted = start + j * tile_rows
            first = jnp.minimum(wanted, num_rows - tile_rows)
            row = first + jnp.arange(tile_rows)
            own = ((row >= wanted) & (row < stop))[:, None]
            return tile(inner, fixed, first, own)

        num_tiles = (group_sizes[expert] + tile_rows - 1) // tile_rows
        return end(carry, expert, lax.fori_loop(0, num_tiles, tile_body, inner))

    return lax.fori_loop(0, jnp.sum(group_sizes > 0), expert_body, carry)


def _rows_times_weights(x, w, group_sizes):
    num_rows = x.shape[0]
    y = jnp.zeros((num_rows, w.shape[2]), x.dtype)
    if num_rows == 0:
        return y
    tile_rows = min(TILE_ROWS, num_rows)

    def tile(y, w_expert, first, own):
        x_tile = lax.dynamic_slice_in_dim(x, first, tile_rows)
        old = lax.dynamic_slice_in_dim(y, first, tile_rows)
        new = jnp.dot(x_tile, w_expert, preferred_element_type=jnp.float32).astype(y.dtype)
        return lax.dynamic_update_slice_in_dim(y, jnp.where(own, new, old), first, 0)

    return _fold_tiles(group_sizes, num_rows, lambda y, e: (w[e], y), tile, lambda _, e, y: y, y)


def _rows_times_rows(x, dy, group_sizes):
    num_rows, k, n = x.shape[0], x.shape[1], dy.shape[1]
    dw = jnp.zeros((group_sizes.shape[0], k, n), jnp.float32)
    if num_rows == 0:
        return dw
    tile_rows = min(TILE_ROWS, num_rows)

    def tile(dw_expert, _, first, own):
        x_tile = jnp.where(own, lax.dynamic_slice_in_dim(x, first, tile_rows), 0)
        dy_tile = jnp.where(own, lax.dynamic_slice_in_dim(dy, first, tile_rows), 0)
        return dw_expert + jnp.einsum("mk,mn->kn", x_tile, dy_tile, preferred_element_type=jnp.float32)

    def begin(dw, e):
        return None, jnp.zeros((k, n), jnp.float32)

    def end(dw, e, dw_expert):
        return lax.dynamic_update_index_in_dim(dw, dw_expert, e, 0)

    return _fold_tiles(group_sizes, num_rows, begin, tile, end, dw)


IMPLEMENTATIONS: dict[str, Callable] = {"tiles": tiles, "ragged_dot": ragged_dot, "reference": reference}
