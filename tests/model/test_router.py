"""The three routers against a transcription of their published equations into NumPy loops."""

import functools

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from flax import nnx
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dsjax.config import ModelConfig, replace
from dsjax.model.router import Router, choose_experts, gate_weights

pytestmark = pytest.mark.usefixtures("one_device")

E, K, TOKENS = 16, 4, 6
BASE = models.v3(n_routed_experts=E, num_experts_per_tok=K, n_group=4, topk_group=2)
ROUTERS = {
    "greedy": models.moe(n_routed_experts=E, num_experts_per_tok=K),
    "group_limited_greedy": models.v2(n_routed_experts=E, num_experts_per_tok=K, routed_scaling_factor=16.0),
    "noaux_tc": BASE,
    "noaux_tc, one group": replace(BASE, n_group=1, topk_group=1),
}
NEAR = 1e-6  # float32 rounds there: which of two such scores is larger is not defined


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def choose(logits, bias, cfg: ModelConfig) -> tuple[set[int], np.ndarray, float]:
    """(experts, scores, smallest gap between what was taken and what was left) of one token."""
    scores = sigmoid(logits) if cfg.scoring_func == "sigmoid" else softmax(logits)
    biased = scores + bias if cfg.topk_method == "noaux_tc" else scores
    groups = np.arange(len(scores)).reshape(cfg.n_group, -1)
    if cfg.topk_method == "noaux_tc":
        rank = [sum(sorted(biased[g])[-2:]) for g in groups]
    else:
        rank = [max(biased[g]) for g in groups]
    by_rank = sorted(range(len(groups)), key=lambda g: -rank[g])
    kept, left = by_rank[: cfg.topk_group], by_rank[cfg.topk_group :]
    gap = min((rank[a] - rank[b] for a in kept for b in left), default=np.inf)
    allowed = sorted((e for g in kept for e in groups[g]), key=lambda e: -biased[e])
    taken, rest = allowed[: cfg.num_experts_per_tok], allowed[cfg.num_experts_per_tok :]
    gap = min([gap, *(biased[a] - biased[b] for a in taken for b in rest)])
    return set(taken), scores, gap


def share(scores, expert, taken, cfg: ModelConfig) -> float:
    """The published gate: V3 normalises, then scales; V1 and V2 scale what they do not normalise."""
    if cfg.topk_method == "noaux_tc":
        total = sum(scores[e] for e in taken) if cfg.norm_topk_prob else 1.0
        return cfg.routed_scaling_factor * scores[expert] / total
    if cfg.norm_topk_prob:
        return scores[expert] / sum(scores[e] for e in taken)
    return cfg.routed_scaling_factor * scores[expert]


@functools.partial(jax.jit, static_argnames="cfg")
def route(logits, bias, cfg):
    """Indices and weights; the router's weight is the identity, so that its input is its logits."""
    router = Router(replace(cfg, hidden_size=cfg.n_routed_experts), rngs=nnx.Rngs(0))
    router = jax.tree.map(lambda w: jnp.eye(cfg.n_routed_experts), router)
    routing = router(logits[None], bias)
    return routing.indices[0], routing.weights[0], routing.scores[0]


@pytest.mark.parametrize("name", ROUTERS)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([0.3, 1.0, 4.0]), shift=st.sampled_from([0.0, -3.0, 3.0]))
def test_a_token_goes_where_the_equations_send_it(name, seed, spread, shift):
    cfg = ROUTERS[name]
    rng = np.random.default_rng(seed)
    logits = (spread * rng.normal(size=(TOKENS, E))).astype(np.float32)
    bias = (shift + 0.3 * rng.normal(size=E)).astype(np.float32)  # shift -3: all biased scores are negative
    indices, weights, scores = jax.tree.map(np.asarray, route(logits, bias, cfg))
    for t in range(TOKENS):
        expected, raw, gap = choose(logits[t].astype(np.float64), bias.astype(np.float64), cfg)
        assume(gap > NEAR * max(1, abs(shift)))
        assert set(indices[t].tolist()) == expected
        np.testing.assert_allclose(scores[t], raw, rtol=2e-6, atol=1e-7)
        expected_weights = [share(raw, e, expected, cfg) for e in indices[t]]
        np.testing.assert_allclose(weights[t], expected_weights, rtol=1e-5)


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("normalised", [True, False])
def test_v3_normalises_and_scales_where_v2_does_one_of_the_two(name, normalised):
    cfg = replace(ROUTERS[name], norm_topk_prob=normalised, routed_scaling_factor=3.0)
    scores = jnp.asarray([[[0.1, 0.2, 0.3, 0.05] + [0.01] * 12]])
    weights = gate_weights(scores, jnp.asarray([[[2, 1, 0, 3]]]), cfg)[0, 0]
    expected = np.asarray([0.3, 0.2, 0.1, 0.05])
    if normalised:
        expected /= 0.65
    if not normalised or cfg.topk_method == "noaux_tc":
        expected *= 3
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_replayed_indices_are_kept_and_weighed_by_their_own_scores():
    router = Router(replace(BASE, hidden_size=E), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 3, E))
    free = router(x, jnp.zeros(E))
    worst = jnp.argsort(free.scores, axis=-1)[..., :K].astype(jnp.int32)
    replayed = router(x, jnp.zeros(E), worst)
    np.testing.assert_array_equal(replayed.indices, worst)
    np.testing.assert_array_equal(replayed.scores, free.scores)
    np.testing.assert_allclose(jnp.sum(replayed.weights, axis=-1), BASE.routed_scaling_factor, rtol=1e-6)
    again = router(x, jnp.full(E, 7.0), free.indices)
    np.testing.assert_array_equal(again.weights, free.weights)


def test_scores_are_float32_whatever_the_hidden_state():
    router = Router(BASE, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 3, BASE.hidden_size), jnp.bfloat16)
    routing = router(x, jnp.zeros(E))
    exact = jax.nn.sigmoid(np.asarray(x, np.float32) @ np.asarray(router.weight[...]))
    assert routing.scores.dtype == routing.weights.dtype == jnp.float32
    np.testing.assert_allclose(routing.scores, exact, rtol=1e-6)


def test_the_bias_moves_the_choice_and_has_no_gradient():
    scores = jax.nn.sigmoid(jax.random.normal(jax.random.key(0), (1, 1, E)))
    lifted = jnp.zeros(E).at[5].set(10.0)
    assert 5 in np.asarray(choose_experts(scores, lifted, BASE))
    router = Router(BASE, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 3, BASE.hidden_size))
    gradient = jax.grad(lambda bias: jnp.sum(router(x, bias).weights ** 2))(lifted)
    np.testing.assert_array_equal(gradient, 0)
