"""Grouped matmul: rows sorted by expert, each multiplied by its own expert's weights.

`grouped_matmul` is the public function, `reference` its definition, `tiles` the one that XLA:CPU runs fast,
`pallas_tpu` (in grouped_matmul_tpu.py) that of TPUs and `pallas_gpu` (in grouped_matmul_gpu.py) that of Hopper GPUs.
`grouped_swiglu` is three of them with SwiGLU between, which "tiles" runs in one walk over the rows, and TPUs by
grouped_swiglu_tpu.py.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pallas_kernels import choice, grouped_matmul_gpu
from pallas_kernels.grouped_matmul_gpu import pallas_gpu
from pallas_kernels.grouped_matmul_tpu import pallas_tpu
from pallas_kernels.grouped_swiglu_tpu import pallas_swiglu

IMPLEMENTATION_BY_PLATFORM = {"cpu": "tiles", "tpu": "pallas_tpu", "gpu": "pallas_gpu"}
ALIGNMENT = {"pallas_gpu": grouped_matmul_gpu.ALIGNMENT}  # of groups, for which no rows are copied


def grouped_matmul(
    x: Float[Array, "M K"],
    w: Float[Array, "E K N"],
    group_sizes: Int[Array, "E"],
    *,
    implementation: str = "auto",
    alignment: int = 1,
) -> Float[Array, "M N"]:
    """Each row of x times the weights of its expert, summed in float32 and returned in the dtype of x.

    The first group_sizes[0] rows of x use w[0], the next group_sizes[1] rows w[1], and so on; groups may be empty and
    need no alignment. Rows after the last group (sum(group_sizes) <= M is the caller's to keep) give zeros, have zero
    gradient and add nothing to that of w, whatever they hold, NaN included. Differentiable once, in x and w.

    implementation: "auto" (by platform), "tiles", "pallas_tpu", "pallas_interpret" (the same kernels on any platform,
    for tests), "pallas_gpu", "ragged_dot" or "reference"; any other name raises ValueError. What "pallas_gpu" cannot
    multiply goes to "tiles", with a line in the log. alignment: what M and all group sizes are multiples of, which the
    caller promises; it saves "pallas_gpu" a copy of the rows where it is a multiple of 128.
    """
    name = choose(implementation)
    if name != "pallas_gpu":
        return IMPLEMENTATIONS[name](x, w, group_sizes)
    if reason := grouped_matmul_gpu.unsupported(x, w):
        choice.warn_once(f"grouped matmul by tiles, not by the kernels for GPUs: {reason}")
        return tiles(x, w, group_sizes)
    return pallas_gpu(x, w, group_sizes, alignment=alignment)


def choose(implementation: str) -> str:
    """The implementation that a name stands for: "auto" goes by platform, an unknown one raises ValueError."""
    return choice.choose(implementation, IMPLEMENTATION_BY_PLATFORM, IMPLEMENTATIONS)


def grouped_swiglu(
    x: Float[Array, "M D"],
    row_weights: Float[Array, "M"],
    w_gate: Float[Array, "E D F"],
    w_up: Float[Array, "E D F"],
    w_down: Float[Array, "E F D"],
    group_sizes: Int[Array, "E"],
    *,
    implementation: str = "auto",
    alignment: int = 1,
) -> Float[Array, "M D"]:
    """Each row through the SwiGLU of its expert, times the row's weight; groups and alignment as in `grouped_matmul`.

    For jax.checkpoint the products with w_gate and w_up are named "mlp_gate" and "mlp_up".
    """
    name = choose(implementation)
    if name == "tiles":
        return _tiles_swiglu(x, row_weights[:, None], w_gate, w_up, w_down, group_sizes)
    if name in ("pallas_tpu", "pallas_interpret"):
        operands = x, row_weights, w_gate, w_up, w_down, group_sizes
        return pallas_swiglu(*operands, _weighted_swiglu, interpret=name == "pallas_interpret")
    options = {"group_sizes": group_sizes, "implementation": implementation, "alignment": alignment}
    matmul = functools.partial(grouped_matmul, **options)
    gate = checkpoint_name(matmul(x, w_gate), "mlp_gate")
    up = checkpoint_name(matmul(x, w_up), "mlp_up")
    return matmul(_weighted_swiglu(gate, up, row_weights[:, None]).astype(x.dtype), w_down)


def _weighted_swiglu(gate, up, row_weights):
    # The router's weight goes in here: F numbers a row, where the output has D.
    return jax.nn.silu(gate) * up * row_weights


def reference(x: Float[Array, "M K"], w: Float[Array, "E K N"], group_sizes: Int[Array, "E"]) -> Float[Array, "M N"]:
    """The definition: every expert on all rows, those of the others as zeros. E times the work."""
    row, stops = jnp.arange(x.shape[0]), jnp.cumsum(group_sizes)[:, None]
    own = (row >= stops - group_sizes[:, None]) & (row < stops)
    x_of_expert = jnp.where(own[:, :, None], x, 0)
    y = jnp.einsum("emk,ekn->mn", x_of_expert, w, preferred_element_type=jnp.float32)
    return jnp.where(jnp.any(own, axis=0)[:, None], y, 0).astype(x.dtype)


def ragged_dot(x: Float[Array, "M K"], w: Float[Array, "E K N"], group_sizes: Int[Array, "E"]) -> Float[Array, "M N"]:
    """XLA's own grouped matmul, with the rows after the last group defined as zero.

    On CPUs, GPUs and, without the compiler option xla_tpu_enable_ragged_dot_kernel, TPUs other than v5p, it multiplies
    every row by every expert.
    """
    in_a_group = (jnp.arange(x.shape[0]) < jnp.sum(group_sizes))[:, None]
    # Sums are in float32 inside XLA's kernels; asking for float32 results would hold the gradient of w in float32 too.
    y = lax.ragged_dot(jnp.where(in_a_group, x, 0), w, group_sizes, preferred_element_type=x.dtype)
    return jnp.where(in_a_group, y, 0)


@jax.custom_vjp
def tiles(x: Float[Array, "M K"], w: Float[Array, "E K N"], group_sizes: Int[Array, "E"]) -> Float[Array, "M N"]:
    """A loop over the experts that have rows and, within it, over tiles of their rows: the work of the rows present.

    What XLA:CPU runs fast: each expert's weights are sliced once, every matmul is a dense one, nothing is gathered.
    """
    return rows_times_weights(x, w, group_sizes, transposed=False)


def _tiles_forward(x, w, group_sizes):
    return tiles(x, w, group_sizes), (x, w, group_sizes)


def _tiles_backward(residuals, dy):
    x, w, group_sizes = residuals
    dx = rows_times_weights(dy, w, group_sizes, transposed=True)
    dw = _rows_times_rows(x, dy, group_sizes, w.dtype)
    return dx, dw, None


tiles.defvjp(_tiles_forward, _tiles_backward)


def rows_times_weights(x, w, group_sizes, transposed):
    """y[row] = x[row] @ w[expert of row], or @ w[expert of row].T."""
    y = jnp.zeros((x.shape[0], w.shape[1 if transposed else 2]), _bits(x.dtype))
    contract = (((1,), (1 if transposed else 0,)), ((), ()))

    def begin(expert, y):
        return slice_float32(w, expert, 1)[0], y

    def tile(w_expert, y, rows: Rows):
        return rows.put(y, lax.dot_general(rows.of(x), w_expert, contract), x.dtype)

    def end(expert, y, y_after):
        return y_after

    return lax.bitcast_convert_type(_fold_groups(begin, tile, end, y, group_sizes, x.shape[0]), x.dtype)


def _rows_times_rows(x, dy, group_sizes, dtype):
    """dw[e] = x[rows of e].T @ dy[rows of e]."""
    dw = jnp.zeros((group_sizes.shape[0], x.shape[1], dy.shape[1]), _bits(dtype))

    def begin(expert, dw):
        return None, jnp.zeros(dw.shape[1:], jnp.float32)

    def tile(_, dw_expert, rows: Rows):
        x_tile, dy_tile = rows.select(rows.of(x), 0), rows.select(rows.of(dy), 0)
        return dw_expert + jnp.einsum("mk,mn->kn", x_tile, dy_tile)

    def end(expert, dw, dw_expert):
        return lax.dynamic_update_index_in_dim(dw, _encode(dw_expert, dtype), expert, 0)

    return lax.bitcast_convert_type(_fold_groups(begin, tile, end, dw, group_sizes, x.shape[0]), dtype)


@jax.custom_vjp
def _tiles_swiglu(x, row_weights, w_gate, w_up, w_down, group_sizes):
    return _swiglu_walk(x, row_weights, (w_gate, w_up, w_down), group_sizes, keep=False)[-1]


def _tiles_swiglu_forward(x, row_weights, w_gate, w_up, w_down, group_sizes):
    weights = w_gate, w_up, w_down
    gate, up, y = _swiglu_walk(x, row_weights, weights, group_sizes, keep=True)
    gate, up = checkpoint_name(gate, "mlp_gate"), checkpoint_name(up, "mlp_up")
    return y, (x, row_weights, weights, gate, up, group_sizes)


def _swiglu_walk(x, row_weights, weights, group_sizes, keep):
    """What leaves the experts, after what w_gate and w_up give if that is to be kept."""
    zeros = [jnp.zeros((x.shape[0], w.shape[2]), _bits(x.dtype)) for w in (weights if keep else weights[2:])]

    def begin(expert, done):
        return [slice_float32(w, expert, 1)[0] for w in weights], done

    def tile(fixed, done, rows: Rows):
        gate, up = (_round(rows.of(x) @ w, x.dtype) for w in fixed[:2])
        h = _round(_weighted_swiglu(gate, up, rows.of(row_weights)), x.dtype)
        new = (gate, up, h @ fixed[2])[-len(done) :]
        return [rows.put(a, n, x.dtype) for a, n in zip(done, new, strict=True)]

    def end(expert, done, inner):
        return inner

    done = _fold_groups(begin, tile, end, zeros, group_sizes, x.shape[0])
    return [lax.bitcast_convert_type(a, x.dtype) for a in done]


def _tiles_swiglu_backward(residuals, dy):
    x, row_weights, weights, gate, up, group_sizes = residuals
    of_rows = [jnp.zeros(a.shape, _bits(a.dtype)) for a in (x, row_weights)]
    of_experts = [jnp.zeros(w.shape, _bits(w.dtype)) for w in weights]

    def begin(expert, done):
        fixed = [slice_float32(w, expert, 1)[0] for w in weights]
        return fixed, (done[0], [jnp.zeros_like(w) for w in fixed])

    def tile(fixed, inner, rows: Rows):
        own = (rows.select(rows.of(a), 0) for a in (x, dy, gate, up, row_weights))
        x_tile, dy_tile, *factors = own
        h, pull = jax.vjp(_weighted_swiglu, *factors)
        dgate, dup, dweights = pull(dy_tile @ fixed[2].T)
        dx = dgate @ fixed[0].T + dup @ fixed[1].T
        of_rows = [rows.put(a, new, to.dtype) for a, new, to in zip(inner[0], (dx, dweights), (x, row_weights))]
        pairs = (x_tile, dgate), (x_tile, dup), (h, dy_tile)
        return of_rows, [dw + jnp.einsum("mk,mn->kn", *pair) for dw, pair in zip(inner[1], pairs)]

    def end(expert, done, inner):
        put = lax.dynamic_update_index_in_dim
        return inner[0], [put(a, _encode(dw, w.dtype), expert, 0) for a, dw, w in zip(done[1], inner[1], weights)]

    done = _fold_groups(begin, tile, end, (of_rows, of_experts), group_sizes, x.shape[0])
    of = x, row_weights, *weights
    return *(lax.bitcast_convert_type(a, to.dtype) for a, to in zip((*done[0], *done[1]), of)), None


_tiles_swiglu.defvjp(_tiles_swiglu_forward, _tiles_swiglu_backward)


def _bits(dtype) -> jnp.dtype:
    """What the loops slice and update arrays of dtype as: integers for bf16.

    XLA:CPU makes each slice or update of a bf16 array one of the whole array in float32; uint16 it leaves alone.
    """
    return jnp.dtype(jnp.uint16 if dtype == jnp.bfloat16 else dtype)


def _encode(x: jax.Array, dtype) -> jax.Array:
    return lax.bitcast_convert_type(x.astype(dtype), _bits(dtype))


def _round(x: jax.Array, dtype) -> jax.Array:
    """x, float32, to what it is in dtype."""
    return x.astype(dtype).astype(jnp.float32)


def slice_float32(x: jax.Array, first: jax.Array, size: int) -> jax.Array:
    """x[first : first + size] in float32."""
    bits = lax.dynamic_slice_in_dim(lax.bitcast_convert_type(x, _bits(x.dtype)), first, size)
    return lax.bitcast_convert_type(bits, x.dtype).astype(jnp.float32)


@dataclass(frozen=True)
class Rows:
    """One tile of rows: `size` of them from `first` on, of which `own` (all, if None) are the expert's and new."""

    first: jax.Array
    size: int
    own: jax.Array | None = None

    def of(self, x):
        return slice_float32(x, self.first, self.size)

    def put(self, y, new, dtype):
        """y, whose bits are those of dtype, with this tile's rows new."""
        old = lax.dynamic_slice_in_dim(y, self.first, self.size)
        return lax.dynamic_update_slice_in_dim(y, self.select(_encode(new, dtype), old), self.first, 0)

    def select(self, mine, others):
        return mine if self.own is None else jnp.where(self.own[:, None], mine, others)


def _tile_sizes(num_rows: int, num_experts: int) -> tuple[int, int]:
    """Rows of a main tile and of a tail tile: measured on two cores at 1 to 512 rows per expert."""
    tail = min(max(num_rows // max(num_experts, 1), 4), 64)
    tail = 1 << (tail.bit_length() - 1)
    return 4 * tail, min(tail, num_rows)


def _fold_groups(begin: Callable, tile: Callable, end: Callable, carry, group_sizes: jax.Array, num_rows: int):
    """Folds over the experts that have rows, in order, and within each over the tiles of its rows.

    begin(expert, carry) -> (fixed, inner); tile(fixed, inner, rows) -> inner; end(expert, carry, inner) -> carry.
    """
    if num_rows == 0:
        return carry
    main_size, tail_size = _tile_sizes(num_rows, group_sizes.shape[0])
    stops = jnp.cumsum(group_sizes)
    present_first = jnp.argsort(group_sizes == 0, stable=True)

    def fold_expert(i, carry):
        expert = present_first[i]
        size, stop = group_sizes[expert], stops[expert]
        start = stop - size
        num_main = size // main_size
        tail_start = start + num_main * main_size
        fixed, inner = begin(expert, carry)

        def main_tile(j, inner):
            return tile(fixed, inner, Rows(start + j * main_size, main_size))

        def tail_tile(j, inner):
            wanted = tail_start + j * tail_size
            # At the end of x the tile moves back over rows already done, which `own` leaves out.
            first = jnp.minimum(wanted, num_rows - tail_size)
            row = first + jnp.arange(tail_size)
            return tile(fixed, inner, Rows(first, tail_size, own=(row >= wanted) & (row < stop)))

        if main_size <= num_rows:
            inner = lax.fori_loop(0, num_main, main_tile, inner)
        inner = lax.fori_loop(0, (stop - tail_start + tail_size - 1) // tail_size, tail_tile, inner)
        return end(expert, carry, inner)

    return lax.fori_loop(0, jnp.sum(group_sizes > 0), fold_expert, carry)


IMPLEMENTATIONS: dict[str, Callable] = {
    "tiles": tiles,
    "pallas_tpu": pallas_tpu,
    "pallas_interpret": functools.partial(pallas_tpu, interpret=True),
    "pallas_gpu": pallas_gpu,
    "ragged_dot": ragged_dot,
    "reference": reference,
}
