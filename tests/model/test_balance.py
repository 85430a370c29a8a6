"""Load, balance losses and the auxiliary-loss-free bias against the published equations as NumPy loops."""

import functools

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.config import BalanceConfig, replace
from dsjax.model.balance import balance_losses, expert_load, max_violation, update_bias
from dsjax.state import Routing

pytestmark = pytest.mark.usefixtures("one_device")

B, T, E, K, D = 2, 5, 8, 3, 4
FACTORS = BalanceConfig(expert=0.003, device=0.05, communication=0.02, sequence=0.01, n_devices=D)
CFG = replace(models.v2(), n_routed_experts=E, num_experts_per_tok=K, n_group=4, topk_group=2)


def row_losses(indices, scores, cfg, balance) -> dict[str, float]:
    """Equations 12 to 17 of DeepSeekMoE, 23 to 31 of V2 and 17 to 20 of V3 for the tokens of one sequence."""
    t, n = len(indices), cfg.n_routed_experts
    if t == 0:
        return dict.fromkeys(("sequence", "expert", "device", "communication"), 0.0)
    k, d = cfg.num_experts_per_tok, balance.n_devices
    f = [n / (k * t) * sum(i in row for row in indices) for i in range(n)]
    p = [sum(scores[:, i]) / t for i in range(n)]
    members = np.arange(n).reshape(d, -1)
    p_device = [sum(p[i] for i in m) for m in members]
    f_device = [sum(f[i] for i in m) / len(m) for m in members]
    sent = [sum(any(i in row for i in m) for row in indices) for m in members]
    f_sent = [d / (cfg.topk_group * t) * s for s in sent]
    unbiased = [set(np.argsort(-s)[:k]) for s in scores]
    f_unbiased = [n / (k * t) * sum(i in u for u in unbiased) for i in range(n)]
    p_share = [sum(s[i] / sum(s) for s in scores) / t for i in range(n)]
    return {
        "sequence": balance.sequence * float(np.dot(f_unbiased, p_share)),
        "expert": balance.expert * float(np.dot(f, p)),
        "device": balance.device * float(np.dot(f_device, p_device)),
        "communication": balance.communication * float(np.dot(f_sent, p_device)),
    }


def routing_of(rng) -> Routing:
    scores = rng.uniform(0.01, 1, size=(B, T, E)).astype(np.float32)
    indices = np.argsort(rng.random((B, T, E)), axis=-1)[..., :K].astype(np.int32)  # not those of the best scores
    return Routing(jnp.asarray(indices), jnp.ones((B, T, K)), jnp.asarray(scores))


@jax.jit
def measure(routing, valid):
    return balance_losses(routing, valid, CFG, FACTORS), expert_load(routing, valid)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), lengths=st.lists(st.integers(0, T), min_size=B, max_size=B))
def test_losses_and_load_follow_the_equations_and_leave_padding_out(seed, lengths):
    routing = routing_of(np.random.default_rng(seed))
    valid = np.arange(T) < np.asarray(lengths)[:, None]
    losses, load = measure(routing, jnp.asarray(valid))
    rows = [
        row_losses(np.asarray(routing.indices)[b, :n], np.asarray(routing.scores, np.float64)[b, :n], CFG, FACTORS)
        for b, n in enumerate(lengths)
    ]
    for name, loss in losses.items():
        assert float(loss) == pytest.approx(sum(row[name] for row in rows), rel=1e-5, abs=1e-9), name
    counts = np.bincount(np.asarray(routing.indices)[valid].ravel(), minlength=E)
    np.testing.assert_array_equal(load, counts)


def test_a_loss_of_factor_zero_is_left_out():
    routing, valid = routing_of(np.random.default_rng(0)), jnp.ones((B, T), bool)
    only = functools.partial(balance_losses, routing, valid, CFG)
    assert only(BalanceConfig()) == {}
    assert set(only(BalanceConfig(sequence=1e-4))) == {"sequence"}
    assert set(only(BalanceConfig(device=0.05, n_devices=D))) == {"device"}


def test_perfect_balance_costs_exactly_the_factor_a_row():
    """Uniform scores and an even load are the minimum: f_i = 1 and the shares sum to 1."""
    indices = np.arange(B * 8 * 2).reshape(B, 8, 2) % E
    routing = Routing(jnp.asarray(indices, jnp.int32), jnp.ones((B, 8, 2)), jnp.full((B, 8, E), 1 / E))
    losses = balance_losses(routing, jnp.ones((B, 8), bool), replace(CFG, num_experts_per_tok=2), FACTORS)
    assert float(losses["expert"]) == pytest.approx(B * FACTORS.expert, rel=1e-6)
    assert float(losses["device"]) == pytest.approx(B * FACTORS.device, rel=1e-6)


def test_gradients_reach_the_scores_through_the_shares_alone():
    routing, valid = routing_of(np.random.default_rng(0)), jnp.ones((B, T), bool)

    def loss(scores):
        return balance_losses(routing.replace(scores=scores), valid, CFG, BalanceConfig(expert=1.0))["expert"]

    f = np.stack([np.bincount(row.ravel(), minlength=E) * E / (K * T) for row in np.asarray(routing.indices)])
    expected = np.broadcast_to(f[:, None] / T, (B, T, E))  # of sum_i f_i mean_t s_it, with f a constant
    np.testing.assert_allclose(jax.grad(loss)(routing.scores), expected, rtol=1e-5)


@given(st.lists(st.integers(0, 1000), min_size=E, max_size=E), st.sampled_from([0.001, 0.25]))
@settings(max_examples=25, deadline=None)
def test_the_bias_moves_by_exactly_its_speed_towards_the_mean_load(load, speed):
    bias = np.linspace(-1, 1, E, dtype=np.float32)[None]
    moved = np.asarray(update_bias(jnp.asarray(bias), jnp.asarray([load], jnp.float32), speed))
    mean = np.float32(np.mean(load))  # sums of whole numbers below 2^24 are exact
    for e in range(E):  # b_i += u * sign(mean - count_i): up where there is too little
        step = np.float32(speed) * np.sign(mean - np.float32(load[e]))
        assert moved[0, e] == bias[0, e] + np.float32(step)


def test_max_vio_is_the_excess_of_the_fullest_expert():
    load = jnp.asarray([[1.0, 1, 1, 1], [4, 0, 0, 0], [3, 2, 2, 1], [0, 0, 0, 0]])
    np.testing.assert_allclose(max_violation(load), [0, 3, 0.5, 0], atol=1e-6)
