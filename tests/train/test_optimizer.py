"""Muon against a transcription of Moonlight's and against Optax's, on every mesh; moments in bfloat16."""

import functools
import math

import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.config import OptimizerConfig, replace
from dsjax.precision import weight_name
from dsjax.train.muon import is_matrix, newton_schulz
from dsjax.train.optimizer import make_optimizer
from sharding.mesh import make_mesh

MUON = OptimizerConfig(name="muon", weight_decay=0.1, momentum=0.95)
MODEL = models.v3()


def moonlights(g: np.ndarray) -> np.ndarray:
    """zeropower_via_newtonschulz5 of Moonlight's toy_train.py, for a matrix (out, in) as PyTorch has it, in float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.astype(np.float64)
    if g.shape[0] > g.shape[1]:
        x = x.T
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if g.shape[0] > g.shape[1] else x


def as_linears(name: str, w: np.ndarray) -> list[np.ndarray]:
    """The matrices (out, in) that PyTorch's linear layers hold for a stacked weight, as the converter writes them."""
    w = w.reshape(-1, *w.shape[(2 if "experts" in name else 1) :])
    rows = w.shape[1] * w.shape[2] if name.endswith("wo") else w.shape[1]
    return [layer.reshape(rows, -1).T for layer in w]


def by_the_paper(config: OptimizerConfig, gradients: list[dict], weights: dict) -> dict:
    """Directions of the last of some steps, by numpy: Moonlight's loop, whose weights stand still here."""
    momentum, result = {}, {}
    for name in filter(is_matrix, weights):
        for g in gradients:
            momentum[name] = config.momentum * momentum.get(name, 0) + g[name].astype(np.float64)
        update = g[name] + config.momentum * momentum[name]
        layers = []
        for linear in as_linears(name, update):
            layers.append((0.2 * math.sqrt(max(linear.shape)) * moonlights(linear)).T)
        result[name] = np.stack(layers).reshape(update.shape) + config.weight_decay * weights[name]
    return result


# A weight of each kind: in one axis and more, cut in each way, of layers, of experts, Muon's and not.
KINDS = (
    "embed", "dense/ffn/w_gate", "moe/attn/wkv_a", "moe/attn/wkv_b", "moe/attn/wo", "moe/attn_norm/scale",
    "moe/ffn/experts/w_down", "moe/ffn/experts/w_up", "moe/ffn/router/weight", "mtp_input/eh_proj",
)  # fmt: skip


def weights_of(seed: int) -> dict[str, jax.Array]:
    """A model's weights of those kinds. Under a mesh."""
    leaves = jax.tree_util.tree_leaves_with_path(models.draw(MODEL, seed)[0])
    return {name: a for path, a in leaves if (name := weight_name(path)) in KINDS}


@functools.cache
def drawn(config: OptimizerConfig = MUON, **sizes):
    """Weights, three gradients, and the directions and the state after them, on a mesh."""
    mesh = make_mesh(**sizes) if sizes else make_mesh(jax.devices()[:1])
    with jax.set_mesh(mesh):
        model, *gradients = map(weights_of, range(4))
        optimizer = make_optimizer(config)
        state, update = optimizer.init(model), jax.jit(optimizer.update)
        for g in gradients:
            directions, state = update(g, state, model)
        for a, b in zip(jax.tree.leaves(directions), jax.tree.leaves(model), strict=True):
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
        named = models.named_leaves
        return named(model), [named(g) for g in gradients], named(directions), named(state)


def test_matrices_move_as_in_moonlights_code_and_the_rest_by_adamw():
    weights, gradients, directions, _ = drawn()
    wanted = by_the_paper(MUON, gradients, weights)
    _, _, plain, _ = drawn(replace(MUON, name="adamw"))
    assert [name for name in KINDS if name not in wanted] == ["embed", "moe/attn_norm/scale"]
    for name, direction in directions.items():
        np.testing.assert_allclose(direction, wanted.get(name, plain[name]), atol=2e-4, err_msg=name)


def test_the_size_of_an_update_is_that_of_adamws():
    weights, _, directions, _ = drawn()
    for name in filter(is_matrix, weights):
        update = directions[name] - MUON.weight_decay * weights[name]
        short = min(min(linear.shape) for linear in as_linears(name, update))
        if short > 8:  # of smaller ones, not all singular values are near 1
            assert 0.1 < np.sqrt(np.mean(update**2)) < 0.25, name


@pytest.mark.parametrize(
    "sizes",
    [
        {"fsdp": 2, "expert": 2, "tensor": 2},
        {"data": 2, "fsdp": 4},
        pytest.param({"context": 2, "expert": 4}, marks=pytest.mark.slow),
        pytest.param({"fsdp": 8}, marks=pytest.mark.slow),
        pytest.param({"data": 4, "tensor": 2}, marks=pytest.mark.slow),
    ],
)
def test_the_update_is_the_same_on_every_mesh(sizes):
    one, many = drawn(), drawn(**sizes)
    for part in (2, 3):
        for name, value in one[part].items():
            np.testing.assert_allclose(many[part][name], value, atol=2e-5, err_msg=name)


def test_a_first_step_is_that_of_optax_unsharded():
    """Later ones are not: Optax corrects the momentum's bias, which Moonlight does not."""
    rng = np.random.default_rng(0)
    matrices = {
        "wide": rng.normal(size=(24, 40)),
        "tall": rng.normal(size=(40, 24)),
        "experts": rng.normal(size=(3, 8, 8)),
    }
    matrices = {name: jnp.asarray(m, jnp.float32) for name, m in matrices.items()}
    axes = optax.contrib.MuonDimensionNumbers(-2, -1)
    theirs = optax.contrib.muon(
        1.0, consistent_rms=0.2, eps=1e-7, muon_weight_dimension_numbers=jax.tree.map(lambda _: axes, matrices)
    )
    wanted, _ = theirs.update(matrices, theirs.init(matrices), matrices)
    for name, m in matrices.items():
        ours = 0.2 * math.sqrt(max(m.shape[-2:])) * newton_schulz(m)
        np.testing.assert_allclose(ours, -wanted[name], atol=2e-5, err_msg=name)


@given(st.sampled_from([(6, 10), (10, 6), (1, 5)]), st.integers(0, 999), st.sampled_from([1e-3, 1.0, 1e12]))
@settings(max_examples=25, deadline=None)
def test_singular_vectors_stay_and_values_come_near_one(shape, seed, size):
    g = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    u, s, v = np.linalg.svd(g, full_matrices=False)
    inside = u.T @ np.asarray(jax.jit(newton_schulz)(size * g)) @ v.T
    large = s > 0.03 * np.linalg.norm(g)
    assert np.all(np.abs(np.diag(inside)[large] - 0.95) < 0.3)
    assert np.all(np.abs(inside - np.diag(np.diag(inside))) < 0.02)


def test_zeros_stay_zeros():
    assert not np.any(newton_schulz(jnp.zeros((2, 4, 8))))


def test_moments_in_bfloat16_are_half_as_big_and_follow_those_in_float32():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(256, 16)), rng.normal(size=(256, 4))
    weights = {
        name: jnp.asarray(0.3 * rng.normal(size=n), jnp.float32) for name, n in (("a", (16, 32)), ("b", (32, 4)))
    }

    def loss(w):
        return jnp.mean((jnp.tanh(x @ w["a"]) @ w["b"] - y) ** 2)

    def train(dtype):
        optimizer = make_optimizer(OptimizerConfig(moments_dtype=dtype))

        def step(carry, _):
            w, state = carry
            value, g = jax.value_and_grad(loss)(w)
            updates, state = optimizer.update(g, state, w)
            return (jax.tree.map(lambda w, u: w - 3e-3 * u, w, updates), state), value

        return jax.jit(lambda: jax.lax.scan(step, (weights, optimizer.init(weights)), length=300))()

    (w, state), losses = train("bfloat16")
    (_, exact), wanted = train("float32")
    size, half = (sum(a.nbytes for a in jax.tree.leaves(s) if a.ndim) for s in (exact, state))
    assert 2 * half == size and {a.dtype for a in jax.tree.leaves(w)} == {jnp.dtype("float32")}
    assert wanted[-1] < 0.8 * wanted[0]
    np.testing.assert_allclose(losses, wanted, rtol=5e-3)
    assert np.any(losses != wanted)


def test_moments_are_computed_in_float32_and_rounded_once_a_step():
    adam = OptimizerConfig(moments_dtype="bfloat16")
    g = {"w": jnp.asarray([1.0, -2.0, 3e-3])}
    optimizer = make_optimizer(adam)
    _, state = optimizer.update(g, optimizer.init(g), g)
    mu, nu = state[0].mu["w"], state[0].nu["w"]
    np.testing.assert_array_equal(mu, (0.1 * g["w"]).astype("bfloat16"))
    np.testing.assert_array_equal(nu, (0.05 * g["w"] ** 2).astype("bfloat16"))
    plain = make_optimizer(replace(adam, moments_dtype="float32"))
    wanted, _ = plain.update(g, jax.tree.map(lambda a, b: a.astype(b.dtype), state, plain.init(g)), g)
    ours, _ = optimizer.update(g, state, g)
    np.testing.assert_array_equal(ours["w"], wanted["w"])
