"""Every objective on bandits whose expected step is known in closed form: all groups of answers are enumerated.

A policy over K answers of different lengths, of which the first token alone is random; so the probability of an answer
is that of its first token.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, special

from dsjax.posttrain.objective import OBJECTIVES, Objective, advantages, policy_loss, token_weights

LOGITS = np.array([0.3, -0.5, 0.9])
LENGTHS = np.array([1, 4, 2])
REWARDS = np.array([0.2, 1.0, -0.4])
BINARY = np.array([0.0, 1.0, 1.0])
LONGEST, G = 5, 4
K = len(LOGITS)
GROUPS = np.array(list(itertools.product(range(K), repeat=G)))  # [K^G, G] every group of answers there is


def expected_step(o: Objective, rewards, lengths=LENGTHS, reference=LOGITS, logits=LOGITS):
    """The ascent on the logits that a group brings on average, on policy: through advantages, weights and loss."""
    logits, reference = jnp.asarray(logits, jnp.float32), jnp.asarray(reference, jnp.float32)
    gain = advantages(jnp.asarray(rewards, jnp.float32)[GROUPS], o.scale)
    mask = jnp.asarray(np.arange(LONGEST) < lengths[GROUPS][..., None])  # [groups, G, T]

    def tokens(logits):
        """Log-probabilities: of the first of each answer, and of the rest, which cannot be otherwise."""
        logp = jax.nn.log_softmax(logits)[GROUPS]
        return jnp.where(jnp.arange(LONGEST) == 0, logp[..., None], 0.0)

    old, kept = tokens(logits), tokens(reference)
    probability = jnp.exp(jnp.sum(old[:, :, 0], axis=1))

    def loss(logits):
        def of_group(new, old, kept, gain, mask):
            weights = token_weights(mask, o.normalise, longest=LONGEST)
            return policy_loss(new, old, kept, old, gain, mask, weights, o)[0]

        return jnp.sum(probability * jax.vmap(of_group)(tokens(logits), old, kept, gain, mask))

    return -jax.grad(loss)(logits)


def by_answers(pi, worth) -> np.ndarray:
    """The gradient on the logits of sum_a pi_a worth_a, with worth fixed."""
    return pi * (worth - np.sum(pi * worth))


def shape(o: Objective) -> np.ndarray:
    """What the one random token of each answer counts, in a group that is one batch."""
    return {"sequence": 1 / LENGTHS, "constant": np.full(K, 1 / LONGEST)}[o.normalise]


def expected_score(o: Objective, gain) -> np.ndarray:
    """E over groups of sum_i weight_i gain_i grad log pi(a_i), by a loop over groups in float64. It is that of whole
    answers' ratios, too: n tokens have one ratio each, or all n the n-th root of it."""
    pi, total = special.softmax(LOGITS), np.zeros(K)
    for group in GROUPS:
        n = LENGTHS[group]
        weights = {"sequence": 1 / (G * n), "token": np.full(G, 1 / n.sum()), "constant": np.full(G, 1 / (G * LONGEST))}
        for i, a in enumerate(group):
            total += np.prod(pi[group]) * weights[o.normalise][i] * gain(group)[i] * (np.eye(K)[a] - pi)
    return total


def plain(name: str) -> Objective:
    return Objective(**vars(OBJECTIVES[name]) | {"kl_weight": 0.0})


@pytest.mark.parametrize("name", [name for name, o in OBJECTIVES.items() if not o.scale])
def test_without_the_standard_deviation_it_is_the_policy_gradient_less_an_answers_own_share(name):
    """(G - 1) / G pi_a (r_a - mean), where each answer counts by its length as the normaliser says."""
    pi, o = special.softmax(LOGITS), plain(name)
    one = 1 - 1 / G
    centred = REWARDS - pi @ REWARDS
    expected = one * by_answers(pi, shape(o) * centred)
    np.testing.assert_allclose(expected_step(o, REWARDS), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", [name for name, o in OBJECTIVES.items() if o.scale])
def test_with_it_and_rewards_of_0_and_1_the_gradient_of_p_is_scaled_by_the_groups_mean_deviation(name):
    """grad p E[sqrt(m (1 - m))] / (p (1 - p)), m ~ Binomial(G, p) / G, for answers of one length."""
    o = plain(name)
    pi = special.softmax(LOGITS)
    p = pi @ BINARY
    m = np.arange(G + 1) / G
    chance = np.array([math.comb(G, n) * p**n * (1 - p) ** (G - n) for n in range(G + 1)])
    factor = chance @ np.sqrt(m * (1 - m)) / (p * (1 - p))
    got = expected_step(o, BINARY, np.full(K, 2))  # of two tokens, of which one is random
    np.testing.assert_allclose(got, factor * by_answers(pi, BINARY) / 2, rtol=1e-4)


@pytest.mark.parametrize("rewards", [REWARDS, BINARY], ids=["any rewards", "0 and 1"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_answers_of_any_length_count_as_the_normaliser_says(name, rewards):
    o = plain(name)

    def gain(group):
        r = rewards[group]
        centred = r - r.mean()
        return centred / r.std() if o.scale and np.ptp(r) else centred * (not o.scale)

    np.testing.assert_allclose(expected_step(o, rewards), expected_score(o, gain), rtol=1e-4, atol=1e-7)


# The distance to the reference policy.

REFERENCE = np.array([-0.2, 0.4, 0.1])
ONE_TOKEN = np.ones(K, int)


def kl_alone(kind: str, beta: float = 0.7) -> Objective:
    return Objective(kl_weight=beta, kl=kind, scale=False, normalise="token", clip_high=10.0)


@pytest.mark.parametrize("kind", ["k3", "unbiased"])
def test_the_distance_pulls_on_the_logits_as_its_divergence_does(kind):
    """k3 as KL(reference, policy): beta (ref - pi); times the ratio as KL(policy, reference)."""
    pi, ref, beta = special.softmax(LOGITS), special.softmax(REFERENCE), 0.7
    got = expected_step(kl_alone(kind, beta), np.zeros(K), ONE_TOKEN, REFERENCE)
    expected = beta * (ref - pi) if kind == "k3" else -beta * by_answers(pi, np.log(pi / ref))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["k3", "unbiased"])
def test_ascent_ends_where_reward_and_distance_balance(kind):
    """pi_a = beta ref_a / (beta + mean - r_a) for k3, and pi ~ ref exp(r / beta) for the unbiased one; rewards are
    scaled by (G - 1) / G, which an answer's own share in its group's mean takes away."""
    beta, ref = 0.7, special.softmax(REFERENCE)
    o, r = kl_alone(kind, beta), REWARDS * (G - 1) / G
    ascend = jax.jit(
        lambda logits: jax.lax.fori_loop(
            0, 400, lambda _, x: x + 2 * expected_step(o, REWARDS, ONE_TOKEN, REFERENCE, x), logits
        )
    )
    logits = ascend(jnp.asarray(LOGITS, jnp.float32))
    found = special.softmax(np.asarray(logits, np.float64))
    if kind == "unbiased":
        expected = special.softmax(np.log(ref) + r / beta)
    else:
        mean = optimize.brentq(lambda m: np.sum(beta * ref / (beta + m - r)) - 1, r.max() - beta + 1e-6, r.max() + 10)
        expected = beta * ref / (beta + mean - r)
        np.testing.assert_allclose(expected @ r, mean, rtol=1e-6)  # it is the mean reward of that policy
    np.testing.assert_allclose(found, expected, atol=2e-5)
