"""The loss of policy optimisation against the papers' equations, token by token, and against closed forms."""

from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config import GrpoConfig
from dsjax.posttrain.objective import OBJECTIVES, Objective, advantages, policy_loss, token_weights

B, T, LONGEST = 6, 5, 8


def drawn(seed=0):
    rng = np.random.default_rng(seed)
    logp, old, reference, sampler = rng.normal(-2, 0.5, (4, B, T))
    lengths = np.array([5, 3, 1, 4, 2, 5])
    mask = np.arange(T) < lengths[:, None]
    return logp, old, reference, sampler, rng.normal(size=B), mask


def by_hand(logp, old, reference, sampler, advantage, mask, o: Objective) -> float:
    """The objective to be maximised, as the papers write it, in float64."""
    total = 0.0
    for i in range(B):
        n = mask[i].sum()
        tokens = range(n)
        sequence = np.exp(np.mean([logp[i, t] - old[i, t] for t in tokens]))
        far = np.mean([sampler[i, t] - logp[i, t] for t in tokens])
        for t in tokens:
            ratio = sequence if o.ratio == "sequence" else np.exp(logp[i, t] - old[i, t])
            bounded = min(max(ratio, 1 - o.clip_low), 1 + o.clip_high)
            value = min(ratio * advantage[i], bounded * advantage[i])
            if o.off_policy is not None and advantage[i] < 0 and far > o.off_policy:
                value = 0.0
            if o.most_weight is not None:
                value *= min(np.exp(old[i, t] - sampler[i, t]), o.most_weight)
            r = np.exp(reference[i, t] - logp[i, t])
            k3 = r - np.log(r) - 1
            value -= o.kl_weight * k3 * (np.exp(logp[i, t] - old[i, t]) if o.kl == "unbiased" else 1)
            total += value / {"sequence": n * B, "token": mask.sum(), "constant": B * LONGEST}[o.normalise]
    return total


def loss_of(o, logp, old, reference, sampler, advantage, mask, rows=slice(None)):
    weights = token_weights(jnp.asarray(mask), o.normalise, longest=LONGEST)
    given = (jnp.asarray(a)[rows] for a in (logp, old, reference, sampler, advantage, mask))
    return policy_loss(*given, weights[rows], o)[0]


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_loss_is_the_papers_equation(name, seed):
    given = drawn(seed)
    expected = -by_hand(*given, OBJECTIVES[name])
    np.testing.assert_allclose(loss_of(OBJECTIVES[name], *given), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_micro_batches_add_up_to_the_batch(name):
    given, o = drawn(), OBJECTIVES[name]
    parts = [loss_of(o, *given, rows=slice(i, i + 2)) for i in range(0, B, 2)]
    np.testing.assert_allclose(sum(parts), loss_of(o, *given), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_is_not_of_an_answer_does_not_matter(name):
    o, (*values, advantage, mask) = OBJECTIVES[name], drawn()
    other = [np.where(mask, a, np.nan) for a in values]
    grad = jax.grad(lambda logp, rest: loss_of(o, logp, *rest, advantage, mask))
    np.testing.assert_array_equal(grad(jnp.asarray(other[0]), other[1:]), grad(jnp.asarray(values[0]), values[1:]))
    assert not np.any(np.asarray(grad(jnp.asarray(values[0]), values[1:]))[~mask])


def test_advantages_are_of_the_group():
    rewards = np.array([[1.0, 0, 0, 0], [5, 5, 5, 5], [1, 0, 1, 0]])
    got = np.asarray(advantages(jnp.asarray(rewards)))
    expected = (rewards[0] - 0.25) / np.sqrt(0.25 * 0.75)
    np.testing.assert_allclose(got, [expected, np.zeros(4), [1, -1, 1, -1]], rtol=1e-6)
    np.testing.assert_allclose(advantages(jnp.asarray(rewards), scale=False)[0], [0.75, -0.25, -0.25, -0.25])


def test_on_policy_the_gradient_is_the_policy_gradient():
    """With the policy where it began, the ratio is 1 and the gradient of a token is -weight x advantage."""
    logp, _, _, _, advantage, mask = drawn()
    for o in (Objective(), Objective(scale=False, normalise="constant"), Objective(clip_high=0.28, normalise="token")):
        weights = token_weights(jnp.asarray(mask), o.normalise, longest=LONGEST)
        grad = jax.grad(
            lambda x, o=o, w=weights: policy_loss(
                x, jnp.asarray(logp), None, None, jnp.asarray(advantage), jnp.asarray(mask), w, o
            )[0]
        )(jnp.asarray(logp))
        np.testing.assert_allclose(grad, -np.asarray(weights) * advantage[:, None], rtol=1e-5, atol=1e-7)


def test_clipping_stops_the_side_that_gains_and_no_other():
    o = Objective(clip_low=0.2, clip_high=0.3)
    one = jnp.ones((1, 1), bool)

    def slope(ratio, advantage):
        def loss(x):
            gain = jnp.full((1,), advantage, jnp.float32)
            return policy_loss(x, jnp.zeros((1, 1)), None, None, gain, one, jnp.ones((1, 1)), o)[0]

        return float(jax.grad(loss)(jnp.full((1, 1), np.log(ratio), jnp.float32))[0, 0])

    np.testing.assert_allclose([slope(1.29, 1.0), slope(0.5, 1.0)], [-1.29, -0.5], rtol=1e-5)
    np.testing.assert_allclose([slope(0.81, -1.0), slope(2.0, -1.0)], [0.81, 2.0], rtol=1e-5)
    assert slope(1.31, 1.0) == 0 and slope(0.79, -1.0) == 0


def test_the_unbiased_penalty_has_the_gradient_of_the_divergence():
    """Summed over all outcomes by their probability, it is the gradient of KL(policy, reference); that of k3 is not."""
    rng = np.random.default_rng(0)
    logits, reference = (jnp.asarray(rng.normal(size=7), jnp.float32) for _ in range(2))
    ref = jax.nn.log_softmax(reference)

    def divergence(logits):
        logp = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(logp) * (logp - ref))

    def sampled(kind):
        o = Objective(kl_weight=1.0, kl=kind)
        start = jax.nn.log_softmax(logits)

        def loss(logits):
            logp = jax.nn.log_softmax(logits)[:, None]
            mask = jnp.ones((7, 1), bool)
            return policy_loss(
                logp, start[:, None], ref[:, None], None, jnp.zeros(7), mask, jnp.exp(start)[:, None], o
            )[0]

        return jax.grad(loss)(logits)

    expected = jax.grad(divergence)(logits)
    np.testing.assert_allclose(sampled("unbiased"), expected, atol=1e-6)
    assert np.abs(np.asarray(sampled("k3") - expected)).max() > 0.01


def test_the_configuration_knows_the_objectives():
    assert set(get_args(get_type_hints(GrpoConfig)["objective"])) == OBJECTIVES.keys()


def test_a_wrong_name_is_an_error():
    with pytest.raises(ValueError, match="normalise='batch'"):
        token_weights(jnp.ones((1, 1), bool), "batch")
