"""Generation: the same tokens for the same seed, in whatever chunks and batches; it ends where it must."""

import functools

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dsjax.config import ComputeConfig, ConfigError
from dsjax.infer import generate
from dsjax.infer.sampling import sample

pytestmark = pytest.mark.usefixtures("one_device")

CFG = models.v3(num_hidden_layers=2, num_nextn_predict_layers=0, max_position_embeddings=64)
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5, 8]]
N = 12
DRAWS, V = 2048, 6


@functools.cache
def drawn():
    return models.draw(CFG)


def run(prompts=PROMPTS, **options) -> np.ndarray:
    """Everything that is generated, [B, n]."""
    options = {"max_tokens": N, "compute": models.COMPUTE, **options}
    chunks = generate.generate_tokens(*drawn(), prompts, **options)
    return np.concatenate(list(chunks), axis=1)


@functools.cache
def greedy() -> np.ndarray:
    return run()


def test_greedy_tokens_are_the_argmax_of_the_full_forward_pass():
    rows = [[*prompt, *new] for prompt, new in zip(PROMPTS, greedy().tolist(), strict=True)]
    batch = models.pack([[len(row)] for row in rows], 32)
    tokens = np.zeros((2, 32), np.int32)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = ids
    batch = batch.replace(tokens=jax.device_put(tokens, batch.tokens.sharding))
    model, bias = drawn()
    best = jax.jit(lambda m, batch: jnp.argmax(m.logits(m(batch, bias, models.COMPUTE).hidden), axis=-1))(model, batch)
    for row, prompt in enumerate(PROMPTS):
        start = len(prompt) - 1
        np.testing.assert_array_equal(best[row, start : start + N], greedy()[row])


def test_a_seed_decides_the_text():
    options = {"temperature": 1.0, "top_p": 0.95}
    first = run(seed=1, **options)
    np.testing.assert_array_equal(run(seed=1, **options), first)
    assert np.any(run(seed=2, **options) != first)
    assert first.shape == (2, N)
    assert first.min() >= 0 and first.max() < CFG.vocab_size


def test_the_text_does_not_depend_on_the_chunk(monkeypatch):
    whole = run(seed=1, temperature=1.0)
    monkeypatch.setattr(generate, "CHUNK", 4)
    generate._next.clear_cache()
    chunks = list(
        generate.generate_tokens(*drawn(), PROMPTS, compute=models.COMPUTE, max_tokens=N, seed=1, temperature=1.0)
    )
    generate._next.clear_cache()
    assert [chunk.shape[1] for chunk in chunks] == [1, 4, 4, 3]
    np.testing.assert_array_equal(np.concatenate(chunks, axis=1), whole)


def test_rows_of_a_batch_are_what_they_are_alone():
    for row, prompt in enumerate(PROMPTS):
        np.testing.assert_array_equal(run([prompt])[0], greedy()[row])


@pytest.mark.parametrize("one_by_one", [True, False])
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one row", "two rows"])
def test_tokens_do_not_depend_on_how_weights_are_read(prompts, one_by_one):
    got = run(prompts, one_by_one=one_by_one, compute=ComputeConfig(grouped_matmul="tiles"))
    np.testing.assert_array_equal(got, greedy()[: len(prompts)])


@pytest.mark.parametrize("n", [1, 2, N - 1])
def test_max_tokens_are_honoured(n):
    np.testing.assert_array_equal(run(max_tokens=n), greedy()[:, :n])


def test_a_row_that_ended_stays_ended_and_all_ended_stop():
    eos = int(greedy()[0, 4]), int(greedy()[1, 2])  # two ways to end
    ends = [next((i for i, token in enumerate(row) if token in eos), N) for row in greedy().tolist()]
    got = run(eos_ids=eos)
    assert got.shape[1] == min(N, max(ends) + 1)
    for row, end in enumerate(ends):
        np.testing.assert_array_equal(got[row, : end + 1], greedy()[row, : end + 1][: got.shape[1]])
        assert np.all(got[row, end + 1 :] == eos[0])
    alone = run(PROMPTS[:1], eos_ids=eos)
    assert alone.shape == (1, ends[0] + 1)


def test_prompts_that_cannot_be_continued_are_refused():
    message = r"^max_tokens=60: expected at most 55 after a prompt of 9 tokens, as model\.max_position_embeddings=64$"
    with pytest.raises(ConfigError, match=message):
        run(max_tokens=60)
    with pytest.raises(ConfigError, match="at least one token"):
        run([[1], []])


@jax.jit
def draws(logits, seed, temperature, top_p):
    rows = jnp.broadcast_to(logits, (DRAWS, V))
    return sample(rows, jax.random.key(seed), temperature, top_p)


@given(
    st.lists(st.floats(-1.5, 1.5, width=32), min_size=V, max_size=V),
    st.sampled_from([0.5, 1.0, 1.5]),
    st.floats(0.05, 1.0),
    st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_top_p_keeps_the_smallest_set_that_reaches_it(logits, temperature, top_p, seed):
    p = np.exp(np.asarray(logits, np.float64) / temperature)
    p /= p.sum()
    order = np.argsort(-p)
    assume(np.all(np.diff(np.sort(p)) > 1e-6))
    before = np.cumsum(p[order]) - p[order]
    assume(np.all(np.abs(before - top_p) > 1e-5))
    kept = {int(i) for i in order[before < top_p]}
    common = {i for i in kept if p[i] > 0.01}  # a rarer one may be missing from 2048 draws by chance
    got = set(np.asarray(draws(jnp.asarray(logits, jnp.float32), seed, temperature, top_p)).tolist())
    assert common <= got <= kept


def test_frequencies_are_the_probabilities_and_temperature_zero_takes_the_likeliest():
    logits = jnp.asarray([0.0, 1.0, -1.0, 0.5, 0.2, -0.3], jnp.float32)
    got = np.bincount(np.asarray(draws(logits, 0, 0.7, 1.0)), minlength=V) / DRAWS
    np.testing.assert_allclose(got, jax.nn.softmax(logits / 0.7), atol=4 * np.sqrt(0.25 / DRAWS))
    assert set(np.asarray(draws(logits, 0, 0.0, 0.5)).tolist()) == {1}
    assert set(np.asarray(draws(logits, 0, 1.0, 0.0)).tolist()) == {1}  # never fewer than one
