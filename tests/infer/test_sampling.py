"""Sampling: the sets that top-k, top-p and min-p keep, frequencies, and noise that is of seed and place alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dsjax.infer.sampling import logprobs_of, sample
from dsjax.state import Sampling

pytestmark = pytest.mark.usefixtures("one_device")

DRAWS, V = 2048, 6


def how(n, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=None) -> Sampling:
    """The same for n rows, each with a seed of its own."""
    floats = (jnp.full(n, value, jnp.float32) for value in (temperature, top_p, min_p))
    temperature, top_p, min_p = floats
    seed = jnp.arange(n) if seed is None else jnp.full(n, seed)
    return Sampling(temperature, jnp.full(n, top_k, jnp.int32), top_p, min_p, seed.astype(jnp.uint32))


run = jax.jit(sample)


def draws(logits, n=DRAWS, **options) -> np.ndarray:
    logits = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (n, 1, len(logits)))
    return np.asarray(run(logits, how(n, **options), jnp.zeros((n, 1), jnp.int32)))[:, 0]


numbers = st.lists(st.floats(-1.5, 1.5, width=32), min_size=V, max_size=V)


@given(numbers, st.sampled_from([0.5, 1.0, 1.5]), st.floats(0.05, 1.0), st.integers(0, V + 2), st.floats(0, 0.9))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_what_is_drawn_is_what_top_k_top_p_and_min_p_keep(logits, temperature, top_p, top_k, min_p):
    p = np.exp(np.asarray(logits, np.float64) / temperature)
    p /= p.sum()
    order = np.argsort(-p)
    assume(np.all(np.diff(np.sort(p)) > 1e-6))
    some = order[: top_k or V]
    before = (np.cumsum(p[some]) - p[some]) / p[some].sum()
    assume(np.all(np.abs(before - top_p) > 1e-5) and np.all(np.abs(p / p.max() - min_p) > 1e-5))
    kept = {int(i) for i, b in zip(some, before) if b < top_p and p[i] >= min_p * p.max()}
    common = {i for i in kept if p[i] > 0.01}  # a rarer one may be missing from 2048 draws by chance
    got = set(draws(logits, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p).tolist())
    assert common <= got <= kept


def test_frequencies_are_the_probabilities_and_temperature_zero_takes_the_likeliest():
    logits = [0.0, 1.0, -1.0, 0.5, 0.2, -0.3]
    got = np.bincount(draws(logits, temperature=0.7), minlength=V) / DRAWS
    expected = np.asarray(jax.nn.softmax(jnp.asarray(logits) / 0.7))
    chi_square = DRAWS * np.sum((got - expected) ** 2 / expected)
    assert chi_square < 20.5  # of 5 degrees of freedom: once in a thousand seeds, and ours is fixed
    assert set(draws(logits, temperature=0.0, top_p=0.5).tolist()) == {1}
    assert set(draws(logits, top_p=0.0).tolist()) == {1}  # never fewer than one
    assert set(draws(logits, top_k=1).tolist()) == {1}


def test_a_row_is_sampled_as_it_asks_whatever_the_others_do():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 1, 50)), jnp.float32)
    one = how(3, seed=7)
    mixed = one.replace(
        temperature=jnp.asarray([1.0, 0.0, 1.0]), top_k=jnp.asarray([0, 0, 1]), top_p=jnp.asarray([1.0, 1, 0.5])
    )
    place = jnp.full((3, 1), 5, jnp.int32)
    got = run(logits, mixed, place)[:, 0]
    assert got[0] == run(logits, one, place)[0, 0]
    assert got[1] == jnp.argmax(logits[1]) and got[2] == jnp.argmax(logits[2])


def test_noise_is_of_seed_and_place_alone():
    row = jnp.zeros((1, 1, 1000))
    many = jnp.zeros((4, 3, 1000))
    places = jnp.asarray([[3, 4, 5]] * 4, jnp.int32)
    got = np.asarray(run(many, how(4), places))
    for seed in range(4):
        for i, place in enumerate((3, 4, 5)):
            assert run(row, how(1, seed=seed), jnp.full((1, 1), place, jnp.int32))[0, 0] == got[seed, i]
    assert len(set(got.ravel().tolist())) == 12


def test_logprobs_are_of_the_tempered_distribution_and_the_top_ones_fall():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 30)), jnp.float32)
    some = how(2).replace(temperature=jnp.asarray([0.5, 0.0]))
    tokens = jnp.asarray([[3], [4]], jnp.int32)
    got = jax.jit(logprobs_of)(logits, some, tokens, np.bool_(True))
    for row, temperature in enumerate((0.5, 1.0)):
        expected = np.asarray(jax.nn.log_softmax(logits[row, 0] / temperature))
        np.testing.assert_allclose(got.chosen[row, 0], expected[tokens[row, 0]], rtol=1e-6)
        order = np.argsort(-expected)[:20]
        np.testing.assert_array_equal(got.top_ids[row, 0], order)
        np.testing.assert_allclose(got.top[row, 0], expected[order], rtol=1e-6)
    nothing = jax.jit(logprobs_of)(logits, some, tokens, np.bool_(False))
    assert not np.any(nothing.chosen) and nothing.top.shape == (2, 1, 20)
