"""Linear layers and SwiGLU in FP8: outputs and gradients from the operands that the recipe says, and what is kept."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.precision import RECIPES
from pallas_kernels.quantise import E4M3, Quantised, dequantise, quantise
from pallas_kernels.scaled_linear import scaled_linears, scaled_swiglu

M, K, N, E = 140, 136, 130, 3
SIZES = np.array([50, 0, 70])  # 20 rows in no group
FP8 = [name for name, recipe in RECIPES.items() if recipe.mlp]
rng = np.random.default_rng(0)
X, DY = (rng.normal(size=shape).astype(np.float32) for shape in ((M, K), (M, N)))
WS = tuple(rng.normal(size=(E, K, N)).astype(np.float32) for _ in range(2))


def groups(sizes):
    stops = np.cumsum(sizes)
    return [(e, slice(stop - size, stop)) for e, (size, stop) in enumerate(zip(sizes, stops))]


def through(x, tile):
    """What x is after it was quantised."""
    return np.asarray(dequantise(quantise(jnp.asarray(x, jnp.float32), tile)), np.float64)


def assert_close(got, wanted, tolerance=2e-6):
    for g, w in zip(jax.tree.leaves(got), wanted, strict=True):
        np.testing.assert_allclose(np.asarray(g, np.float64), w, rtol=0, atol=tolerance * np.abs(w).max())


@functools.partial(jax.jit, static_argnames=("scaling", "grouped"))
def run(x, ws, dy, scaling, grouped):
    sizes = jnp.asarray(SIZES) if grouped else None
    y, pull = jax.vjp(lambda x, ws: scaled_linears(x, ws, scaling, sizes), x, ws)
    return y, *pull(tuple(dy for _ in ws))


@pytest.mark.parametrize("name", FP8)
@pytest.mark.parametrize("grouped", [False, True], ids=["dense", "grouped"])
def test_outputs_and_gradients_are_products_of_the_quantised_operands(name, grouped):
    scaling = RECIPES[name].mlp
    ws = WS if grouped else tuple(w[0] for w in WS)
    x, dy = X.copy(), DY.copy()
    if grouped:
        x[120:] = dy[120:] = 0  # rows in no group
    forward, backward, of_weights = scaling.forward, scaling.input_gradient, scaling.weight_gradient
    kept = through(x, scaling.kept)
    operands = [through(x, forward.left), through(dy, backward.left), through(kept, of_weights.left)]
    x_q, dy_q, x_t, dy_t = *operands, through(dy, of_weights.right)
    ys, dx, dws = [], 0, []
    for w in ws:
        w_q, w_t = (through(w, tile) for tile in (forward.right, backward.right))
        if grouped:
            y, step, dw = np.zeros((M, N)), np.zeros((M, K)), np.zeros((E, K, N))
            for e, rows in groups(SIZES):
                y[rows], step[rows] = x_q[rows] @ w_q[e], dy_q[rows] @ w_t[e].T
                dw[e] = x_t[rows].T @ dy_t[rows]
        else:
            y, step, dw = x_q @ w_q, dy_q @ w_t.T, x_t.T @ dy_t
        ys, dx, dws = [*ys, y], dx + step, [*dws, dw]
    assert_close(run(X, ws, DY, scaling, grouped), [*ys, dx, *dws])


def test_rows_in_no_group_count_for_nothing_nan_included():
    x, dy = X.copy(), DY.copy()
    x[120:], dy[120:] = np.nan, 1e9
    scaling = RECIPES["fp8_deepseek"].experts
    for a, b in zip(*(jax.tree.leaves(run(*args, scaling, True)) for args in ((X, WS, DY), (x, WS, dy)))):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("grouped", [False, True], ids=["dense", "grouped"])
def test_swiglu_and_its_gradients_are_those_of_what_is_quantised_and_kept(grouped):
    f, scaling = 96, RECIPES["fp8_deepseek"].experts
    sizes = SIZES if grouped else np.array([M, 0, 0])
    wg, wu, wd = (rng.normal(size=s).astype(np.float32) / 12 for s in ((E, K, f), (E, K, f), (E, f, K)))
    r, x, dy = (rng.random((M, 1)), rng.normal(size=(M, K)), rng.normal(size=(M, K)))
    r, x, dy = (np.where(np.arange(M)[:, None] < sizes.sum(), a, 0).astype(np.float32) for a in (r, x, dy))

    def times(a, w, tiles, transposed=False):
        out = np.zeros((M, w.shape[1 if transposed else 2]))
        a, w = through(a, tiles.left), through(w, tiles.right)
        for e, rows in groups(sizes):
            out[rows] = a[rows] @ (w[e].T if transposed else w[e])
        return out

    def gradient(a, b):
        a, b = through(a, scaling.weight_gradient.left), through(b, scaling.weight_gradient.right)
        return np.stack([a[rows].T @ b[rows] for _, rows in groups(sizes)])

    gate, up = (times(x, w, scaling.forward) for w in (wg, wu))
    y = times(gate / (1 + np.exp(-gate)) * up * r, wd, scaling.forward)
    gate, up, x_kept = (through(a, scaling.kept) for a in (gate, up, x))
    sigmoid = 1 / (1 + np.exp(-gate))
    h = gate * sigmoid * up * r
    dh = times(dy, wd, scaling.input_gradient, transposed=True)
    dgate, dup = dh * r * up * sigmoid * (1 + gate * (1 - sigmoid)), dh * r * gate * sigmoid
    dx = sum(times(d, w, scaling.input_gradient, transposed=True) for d, w in ((dgate, wg), (dup, wu)))
    dr = np.sum(dh * gate * sigmoid * up, axis=1)
    wanted = [y, dx, dr, gradient(x_kept, dgate), gradient(x_kept, dup), gradient(h, dy)]

    @jax.jit
    def ours(x, r, *ws):
        ws = ws if grouped else [w[0] for w in ws]
        groups = jnp.asarray(sizes) if grouped else None
        y, pull = jax.vjp(lambda x, r, *ws: scaled_swiglu(x, r, *ws, scaling, groups), x, r, *ws)
        dx, dr, *dws = pull(jnp.asarray(dy))
        return y, dx, dr, *dws

    got = ours(x, r[:, 0], wg, wu, wd)
    if not grouped:
        wanted = [*wanted[:3], *(w[0] for w in wanted[3:])]
    assert_close(got, wanted, 2e-3)  # a float32 between two values of E4M3 may be rounded to either


def test_what_is_kept_for_the_backward_pass_is_fp8():
    scaling = RECIPES["fp8_deepseek"].mlp
    x = jnp.asarray(X, jnp.bfloat16)
    w_gate, w_up, w_down = (jnp.zeros(shape, jnp.bfloat16) for shape in ((K, 96), (K, 96), (96, K)))
    pull = jax.eval_shape(
        lambda x, *w: jax.vjp(lambda x, *w: scaled_swiglu(x, None, *w, scaling), x, *w)[1], x, w_gate, w_up, w_down
    )
    kept = [a for a in jax.tree.leaves(pull) if a.shape[:1] == (M,)]
    values = [a.shape for a in kept if a.dtype == E4M3]
    assert sorted(values) == [(M, 96), (M, 96), (M, K)]  # gate, up and x; not what leaves SwiGLU
    assert all(a.dtype == jnp.float32 and a.size <= 2 * M for a in kept if a.dtype != E4M3)  # their scales


def test_quantised_is_a_pytree_that_keeps_its_tile():
    a = quantise(jnp.asarray(X), RECIPES["fp8_deepseek"].mlp.forward.left)
    assert jax.tree.map(lambda leaf: leaf, a).tile == a.tile
    assert isinstance(jax.eval_shape(lambda a: a, a), Quantised)
