"""The experts' SwiGLU for TPUs, in Pallas: gate and up of a tile of rows are made in one program, and their SwiGLU
while both are on the chip. Beside separate products, x is read half as often, and gate and up are not read again.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels import grouped_matmul_tpu as matmul
from pallas_kernels.grouped_matmul_tpu import Tiles


def pallas_swiglu(
    x: Float[Array, "M D"],
    row_weights: Float[Array, "M"],
    w_gate: Float[Array, "E D F"],
    w_up: Float[Array, "E D F"],
    w_down: Float[Array, "E F D"],
    group_sizes: Int[Array, "E"],
    swiglu: Callable,
    *,
    tiles: Tiles | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "M D"]:
    """As `grouped_swiglu`, where swiglu(gate, up, row_weights [., 1]) works element by element, here in float32.

    tiles: of the products with w_gate and w_up, chosen if not given. interpret: as of `grouped_matmul_tpu.pallas_tpu`.
    Raises ValueError if no tile of the operands fits the chip's memory.
    """
    weights = w_gate, w_up, w_down
    return _swiglu(x, row_weights[:, None], weights, group_sizes.astype(jnp.int32), swiglu, tiles, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _swiglu(x, row_weights, weights, group_sizes, swiglu, tiles, interpret):
    (h,) = gate_up(x, row_weights, weights[:2], group_sizes, swiglu, tiles, interpret, keep=False)
    return matmul.pallas_tpu(h, weights[2], group_sizes, interpret=interpret)


def _forward(x, row_weights, weights, group_sizes, swiglu, tiles, interpret):
    gate, up, h = gate_up(x, row_weights, weights[:2], group_sizes, swiglu, tiles, interpret, keep=True)
    gate, up = checkpoint_name(gate, "mlp_gate"), checkpoint_name(up, "mlp_up")
    y = matmul.pallas_tpu(h, weights[2], group_sizes, interpret=interpret)
    return y, (x, row_weights, weights, group_sizes, gate, up)


def _backward(swiglu, tiles, interpret, residuals, dy):
    x, row_weights, (w_gate, w_up, w_down), group_sizes, gate, up = residuals

    def gradients(x, w, dy):
        return jax.vjp(lambda x, w: matmul.pallas_tpu(x, w, group_sizes, interpret=interpret), x, w)[1](dy)

    in_group = (jnp.arange(x.shape[0]) < jnp.sum(group_sizes))[:, None]
    h, pull = jax.vjp(lambda *a: swiglu(*a).astype(gate.dtype), gate, up, jnp.where(in_group, row_weights, 0))
    dh, dw_down = gradients(h, w_down, dy)
    dgate, dup, dweights = pull(dh)
    (dx, dw_gate), (dx_up, dw_up) = gradients(x, w_gate, dgate), gradients(x, w_up, dup)
    return dx + dx_up, dweights, (dw_gate, dw_up, dw_down), None


_swiglu.defvjp(_forward, _backward)


def gate_up(
    x: Float[Array, "M D"],
    row_weights: Float[Array, "M 1"],
    weights: tuple[Float[Array, "E D F"], ...],
    group_sizes: Int[Array, "E"],
    swiglu: Callable,
    tiles: Tiles | None = None,
    interpret: bool | pltpu.InterpretParams = False,
    *,
    keep: bool,
) -> tuple[Float[Array, "M F"], ...]:
    """SwiGLU of x with two weights, after both products if they are kept; zeros where a row is in no group."""
    (m, k), (n_groups, _, n) = x.shape, weights[0].shape
    if 0 in (m, k, n):
        return (jnp.zeros((m, n), x.dtype),) * (3 if keep else 1)
    tiles = tiles or matmul.choose_tiles(m, k, n, x.dtype.itemsize, n_weights=2, n_results=3)
    plan = matmul.walk(group_sizes, m, tiles.rows, empty=False)

    def rows(columns, of):
        return pl.BlockSpec((tiles.rows, columns), of)

    def of_group(j, s, starts, group, tile, read):
        return jnp.minimum(group[s], n_groups - 1), 0, j

    weight = pl.BlockSpec((pl.squeezed, k, tiles.columns), of_group)
    result = rows(tiles.columns, lambda j, s, starts, group, tile, read: (tile[s], j))
    results = (jax.ShapeDtypeStruct((m, n), x.dtype),) * (3 if keep else 1)
    return pl.pallas_call(
        functools.partial(_kernel, n_groups=n_groups, swiglu=swiglu),
        out_shape=results,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(pl.cdiv(n, tiles.columns), plan.n_steps),
            in_specs=[
                rows(k, lambda j, s, starts, group, tile, read: (read[s], 0)),
                rows(1, lambda j, s, starts, group, tile, read: (read[s], 0)),
                weight,
                weight,
            ],
            out_specs=[result] * len(results),
        ),
        compiler_params=matmul.parameters("parallel", "arbitrary"),
        cost_estimate=matmul.cost(m, k, 2 * n, x, *weights, *results),
        interpret=interpret,
        name="grouped_swiglu",
    )(*plan[:4], x, row_weights, *weights)


def _kernel(starts, group, tile, read, x, row_weights, w_gate, w_up, *results, n_groups, swiglu):
    step, h = pl.program_id(1), results[-1]
    begin, end = matmul.own_rows(starts, group[step], tile[step], h.shape[0])

    def values(rows, columns):
        gate, up = (
            matmul.product(x[rows], w[:, columns], (((1,), (0,)), ((), ()))).astype(h.dtype) for w in (w_gate, w_up)
        )
        both = (a.astype(jnp.float32) for a in (gate, up))
        return (gate, up, swiglu(*both, row_weights[rows]))[-len(results) :]

    strips = functools.partial(matmul.in_strips, k=2 * x.shape[1], n=h.shape[1])
    matmul.write(results, values, group[step] < n_groups, begin, end, strips)
