"""The step of policy optimisation: against the papers' equation, on any mesh, with experts replayed."""

import functools

import checks
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest

from dsjax.config import replace
from dsjax.model import moe
from dsjax.posttrain import policy, rows
from dsjax.posttrain.objective import advantages
from sharding.mesh import make_mesh


@pytest.mark.usefixtures("one_device")
def test_a_step_is_the_papers_equation():
    checks.check_the_step_is_the_equation()


def test_micro_batches_and_devices_add_up():
    checks.check_micro_batches_and_devices_add_up()


def test_advantages_are_of_the_group():
    checks.check_advantages_are_of_the_group()


@pytest.mark.usefixtures("one_device")
def test_replay_reaches_the_backward_pass():
    checks.check_replay_reaches_the_backward_pass()


@pytest.mark.parametrize("size", [3, 6, 8, 10, 16])
@pytest.mark.parametrize("reward", [0.1, 0.7, 1.1])
def test_rounding_makes_no_advantage(size, reward):
    assert not np.any(advantages(jnp.full((1, size), reward, jnp.float32)))


@pytest.mark.usefixtures("one_device")
def test_multi_token_prediction_learns_and_the_trunk_does_not_feel_it():
    cfg = checks.config(kl_weight=0.0)
    model, bias = models.draw(cfg.model)
    (given,) = checks.micros(cfg)
    counts = policy.count(given, 1)
    gradients = jax.jit(functools.partial(policy.policy_gradients, config=cfg))
    grads = [
        models.named_leaves(gradients(model, bias, given, counts, jnp.float32(weight))[0]) for weight in (0.0, 1.0)
    ]
    for name, without in grads[0].items():
        if name.startswith("mtp"):
            assert np.any(np.abs(grads[1][name] - without) > 1e-6), name
        else:
            np.testing.assert_array_equal(grads[1][name], without, err_msg=name)


@pytest.mark.usefixtures("one_device")
def test_replay_keeps_the_gap_closed_under_router_noise():
    """A router that chooses otherwise while training moves log-probabilities; replayed experts keep them."""
    cfg = checks.config()
    model, bias = models.draw(cfg.model)
    (given,) = checks.micros(cfg)
    batch, one = given.batch, jnp.float32(1)
    score = jax.jit(lambda bias, experts: policy.score(model, bias, batch, one, experts, cfg.compute))
    chosen = models.chosen_experts(model, bias, batch, cfg.compute)
    sampler = score(bias, None)
    noise = jax.tree.map(lambda b: b + np.random.default_rng(0).normal(0, 0.5, b.shape).astype(np.float32), bias)
    apart = [float(jnp.max(jnp.abs(score(noise, experts) - sampler))) for experts in (None, chosen)]
    assert apart[0] > 0.01
    assert apart[1] < 1e-6


def test_a_score_leaves_no_rows_out(monkeypatch):
    """Whatever room the step's buffers have."""
    monkeypatch.setattr(moe, "CHEAP_BYTES", 0)
    with jax.set_mesh(make_mesh(jax.devices()[:2], expert=2)):
        cfg = checks.config()
        model, bias = models.draw(cfg.model)
        (given,) = checks.micros(cfg)
        found = []
        for room in (0.1, None):
            compute = replace(cfg.compute, expert_buffer=room)
            score = jax.jit(functools.partial(policy.score, compute=compute))
            found.append(score(model, bias, given.batch, jnp.float32(1), None))
            if room:
                assert jax.jit(lambda batch, c=compute: model(batch, bias, c).overflow)(given.batch) > 0
        np.testing.assert_array_equal(*found)


def test_the_weights_of_tokens_are_compiled_once(monkeypatch):
    shapes = []
    right = rows.token_weights
    monkeypatch.setattr(rows, "token_weights", lambda mask, *rest: shapes.append(mask.shape) or right(mask, *rest))
    cfg = checks.config()
    for keep in (checks.LONGEST, 3):
        of = checks.groups()
        for answer in (a for g in of for a in g.answers):
            del answer.tokens[keep:], answer.logprobs[keep:], answer.versions[keep:], answer.experts[keep:]
        list(rows.rollouts(of, np.ones((2, 4), np.float32), 0, cfg))
    assert len(set(shapes)) == 1


@pytest.mark.usefixtures("one_device")
def test_weights_are_of_the_whole_step_and_rows_sorted_by_length():
    cfg = checks.config(accumulate=2)
    of = checks.groups()
    made = list(rows.rollouts(of, rows.group_advantages(checks.rewards(), cfg.grpo), 0, cfg))
    assert len(made) == 2
    lengths = [a["segment_ids"].sum(axis=1) for a in made]
    assert lengths[0].max() <= lengths[1].min()
    np.testing.assert_allclose(sum(a["weights"].sum() for a in made), 1, rtol=1e-6)
    for a in made:
        assert not np.any(a["weights"][~a["mask"]])
        assert not np.any(a["mask"] & (np.roll(a["segment_ids"], -1, axis=1) == 0))


def test_answers_that_were_cut_off_can_be_left_out_or_pay():
    of = checks.groups()
    long = max((a for g in of for a in g.answers), key=lambda a: len(a.tokens))
    long.reason = "length"
    cfg = checks.config(overlong="mask")
    made = list(rows.rollouts(of, np.ones((2, 4), np.float32), 0, cfg))
    learned = sum(a["mask"].sum() for a in made)
    assert learned == sum(len(a.tokens) for g in of for a in g.answers) - len(long.tokens)
    cfg = checks.config(overlong="penalty", overlong_buffer=4, objective="dr_grpo", kl_weight=0.0)
    flat = rows.group_advantages(np.stack([rows.paid(g, np.zeros(4), cfg.grpo) for g in of]), cfg.grpo)
    n = np.array([[len(a.tokens) for a in g.answers] for g in of])
    paid = np.minimum(0, (checks.LONGEST - 4 - n) / 4)
    np.testing.assert_allclose(flat, paid - paid.mean(axis=1, keepdims=True), atol=1e-6)
