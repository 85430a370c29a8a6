"""The engine: whatever comes and goes beside it, a request gets the text that it gets alone."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from scipy import special, stats

from dsjax.config import Config, ConfigError, EngineConfig, replace
from dsjax.hub.load import Loaded
from dsjax.infer import engine as module
from dsjax.infer.engine import Engine
from dsjax.infer.requests import Request
from pallas_kernels import paged_attention
from sharding.mesh import make_mesh

CFG = models.v3(num_hidden_layers=2, max_position_embeddings=64)
OPTIONS = {"max_rows": 4, "page_size": 4, "prefill_chunk": 8}
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5, 8], list(range(20)), [7], [2] * 16]
KINDS = {"v3": CFG, "v2": models.v2(max_position_embeddings=64), "moe": models.moe(max_position_embeddings=64)}


@functools.cache
def loaded(kind="v3", **sizes) -> Loaded:
    mesh = make_mesh(jax.devices()[: int(np.prod(list(sizes.values())))], **sizes)
    with jax.set_mesh(mesh):
        model, bias = models.draw(KINDS[kind])
    return Loaded(model, bias, mesh, Config(model=KINDS[kind], seq_len=64, compute=models.COMPUTE), Path())


class Client:
    """A request and what came of it."""

    def __init__(self, prompt, **options):
        self.said, self.reason = [], []
        options = {"max_tokens": 12, "temperature": 0.0, **options}
        self.request = Request(prompt, tell=lambda said: self.said.extend(said), done=self.reason.append, **options)

    @property
    def tokens(self):
        return [one.token for one in self.said]


def serve(clients, kind="v3", sizes=(), **options) -> Engine:
    it = loaded(kind, **dict(sizes))
    with jax.set_mesh(it.mesh):
        engine = Engine(it, EngineConfig(**OPTIONS | options))
        for client in clients:
            engine.submit(client.request)
        engine.run()
    assert all(len(client.reason) == 1 for client in clients)
    assert all(pool.n_held == 0 for pool in engine.pools)  # nothing leaks
    return engine


@functools.cache
def alone(prompt: tuple, **options):
    client = Client(list(prompt), **options)
    serve([client], n_draft=0)
    return client.tokens


@functools.cache
def best_after(kind: str):
    it = loaded(kind)
    forward = jax.jit(lambda m, batch: jnp.argmax(m.logits(m(batch, it.router_bias, models.COMPUTE).hidden), axis=-1))
    return lambda batch: np.asarray(forward(it.model, batch))


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_the_argmax_of_the_full_forward_pass(kind):
    clients = [Client(prompt) for prompt in PROMPTS]
    serve(clients, kind)
    with jax.set_mesh(loaded(kind).mesh):
        batch = models.pack([[len(c.request.tokens)] for c in clients], 32)
        tokens = np.zeros((len(clients), 32), np.int32)
        for row, client in enumerate(clients):
            tokens[row, : len(client.request.tokens)] = client.request.tokens
        best = best_after(kind)(batch.replace(tokens=jax.device_put(tokens, batch.tokens.sharding)))
    for row, client in enumerate(clients):
        start = len(client.request.prompt) - 1
        assert best[row, start : start + 12].tolist() == client.tokens
        assert client.reason == ["length"]


@pytest.mark.parametrize("n_draft", [0, 1, 3])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_p": 0.9, "seed": 5}], ids=["greedy", "sampled"])
def test_the_text_is_the_same_with_drafts_and_without_alone_and_among_others(n_draft, options):
    clients = [Client(prompt, **options) for prompt in PROMPTS]
    engine = serve(clients, n_draft=n_draft)
    for prompt, client in zip(PROMPTS, clients):
        assert client.tokens == alone(tuple(prompt), **options)
    if n_draft and options:  # noise that is shared makes even a model that knows nothing agree with its own drafts
        assert 0 < engine.accepted_at[0] <= engine.drafted_at[0]
        assert sum(one.drafted for client in clients for one in client.said) == engine.accepted_at.sum()


def test_with_drafts_tokens_have_the_distribution_of_the_model():
    """Chi-square of each of the first tokens' counts, over many seeds, against the exact distribution of the full
    forward pass, summed over all texts before. A temperature of 1.5 is told from 1 by these counts."""
    it, n, prompt = loaded(), 3000, [3, 1, 4]
    clients = [Client(prompt, max_tokens=3, temperature=1.0, seed=seed) for seed in range(n)]
    engine = serve(clients, n_draft=1, one_shape=True)  # drafts always, whether they pay or not
    assert engine.accepted_at[0] > 0.1 * n
    texts = [[*prompt, a, b, 0, 0, 0] for a in range(models.VOCAB) for b in range(models.VOCAB)]
    with jax.set_mesh(it.mesh):
        batch = models.pack([[8]] * len(texts), 8)
        batch = batch.replace(tokens=jax.device_put(np.array(texts, np.int32), batch.tokens.sharding))
        forward = jax.jit(lambda m, batch: m.logits(m(batch, it.router_bias, models.COMPUTE).hidden)[:, 2:5])
        logits = np.asarray(forward(it.model, batch)).astype(np.float64)

    def p_values(temperature):
        first, second, third = np.moveaxis(special.softmax(logits / temperature, axis=-1), 1, 0)
        so_far = first[0], second[:: models.VOCAB]  # of a; of b after a
        joint = (so_far[0][:, None] * so_far[1]).reshape(-1)
        for place, expected in enumerate((so_far[0], so_far[0] @ so_far[1], joint @ third)):
            counts = np.bincount([client.tokens[place] for client in clients], minlength=models.VOCAB)
            common = n * expected > 5
            rest = [a[~common].sum() for a in (counts, n * expected)]
            counts, expected = ([*a[common], *[r] * bool(rest[1] > 0)] for a, r in zip((counts, n * expected), rest))
            yield stats.chisquare(counts, expected).pvalue

    assert min(p_values(1.0)) > 1e-3
    assert max(p_values(1.5)) < 1e-3


def test_a_model_that_drafts_well_is_believed():
    """Drafts that are always right: n_draft + 1 tokens a step, the text as without."""
    it = loaded()
    expected = alone((3, 1, 4))
    with jax.set_mesh(it.mesh):
        engine = Engine(it, EngineConfig(**OPTIONS, n_draft=3))
        client = Client([3, 1, 4])
        engine.submit(client.request)
        engine.step()
        while engine.busy:
            n = client.request.n_new
            client.request.drafts = (expected + [0] * 3)[n : n + 3]
            engine.step()
    assert client.tokens == expected
    assert engine.counts["steps"] == 4  # of 1 + 1 token, then 4, 4 and 2
    assert client.request.n_accepted == 3 + 3 + 2 == sum(one.drafted for one in client.said)


def test_where_pages_run_out_the_youngest_waits_and_comes_back_with_the_same_text():
    clients = [Client(prompt, max_tokens=30) for prompt in PROMPTS]
    engine = serve(clients, cache_tokens=80)
    assert engine.counts["preemptions"] > 0
    for prompt, client in zip(PROMPTS, clients):
        assert client.tokens == alone(tuple(prompt), max_tokens=30)


def test_a_prompt_that_begins_as_another_one_did_is_read_from_there_bit_for_bit():
    first, second = Client(PROMPTS[2], logprobs=5), Client([*PROMPTS[2][:18], 40], logprobs=5)
    again, apart = Client(PROMPTS[2], logprobs=5), Client([*PROMPTS[2][:18], 40], logprobs=5)
    it = loaded()
    with jax.set_mesh(it.mesh):
        engine = Engine(it, EngineConfig(**OPTIONS))
        for client in (first, second, again):
            engine.submit(client.request)
            engine.run()
    serve([apart])
    assert [c.request.n_cached for c in (first, second, again, apart)] == [0, 16, 16, 0]
    assert engine.counts["cached_tokens"] == 32
    for a, b in ((first, again), (second, apart)):
        assert [(one.token, one.logprob, one.top) for one in a.said] == [(o.token, o.logprob, o.top) for o in b.said]


def test_with_one_shape_no_bit_depends_on_what_else_is_served():
    options = {"temperature": 1.0, "seed": 3, "logprobs": 5}
    one, many = Client(PROMPTS[1], **options), [Client(prompt, **options) for prompt in PROMPTS]
    serve([one], one_shape=True)
    serve(many, one_shape=True)
    said = [[(o.token, o.logprob, o.top) for o in client.said] for client in (one, many[1])]
    assert said[0] == said[1]


def test_a_request_is_cancelled_wherever_it_is():
    waiting, reading, writing = Client(PROMPTS[0]), Client(list(range(30)), max_tokens=20), Client([1], max_tokens=40)
    it = loaded()
    with jax.set_mesh(it.mesh):
        engine = Engine(it, EngineConfig(**OPTIONS | {"max_rows": 2}))
        for client in (writing, reading, waiting):
            engine.submit(client.request)
        engine.step(), engine.step()
        assert writing.request.prefilled and not reading.request.prefilled and waiting.request in engine.waiting
        for client in (writing, reading, waiting):
            engine.cancel(client.request.id)
        engine.step()
        assert not engine.busy and engine.pools[0].n_held == 0
        assert [c.reason for c in (waiting, reading, writing)] == [["cancelled"]] * 3
        engine.cancel(waiting.request.id)  # once more is no error
        engine.step()


def test_a_text_ends_at_its_end_token_at_a_word_of_tell_and_not_before_min_tokens():
    text = alone((3, 1, 4))
    stop = text[4]
    n = text.index(stop) + 1
    client = Client([3, 1, 4], stop_ids=(stop,))
    serve([client])
    assert client.tokens == text[:n] and client.reason == ["stop"]
    later = Client([3, 1, 4], stop_ids=(stop,), min_tokens=n + 1)
    serve([later])
    assert len(later.tokens) > n and stop not in later.tokens[: n + 1]
    told = Client([3, 1, 4])
    told.request.tell = lambda said: told.said.extend(said) or len(told.said) >= 3
    serve([told], n_draft=0)
    assert told.tokens == text[:3] and told.reason == ["stop"]


def test_bias_and_penalties_are_those_of_the_formulas():
    it = loaded()
    text = alone((3, 1, 4))
    never = Client([3, 1, 4], logit_bias={t: -100.0 for t in set(text)})
    always = Client([3, 1, 4], logit_bias={9: 100.0})
    plain = Client([3, 1, 4], logprobs=20, max_tokens=1)
    seen = Client([3, 1, 4], logprobs=20, max_tokens=1, repetition_penalty=3.0)
    new = Client([3, 1, 4], presence_penalty=2.0, frequency_penalty=2.0, max_tokens=40)
    serve([never, always, plain, seen, new])
    assert not set(never.tokens) & set(text) and set(always.tokens) == {9}
    assert len(set(new.tokens)) > len(set(alone((3, 1, 4), max_tokens=40)))
    with jax.set_mesh(it.mesh):
        batch = models.pack([[3]], 4)
        batch = batch.replace(tokens=jax.device_put(np.array([[3, 1, 4, 0]], np.int32), batch.tokens.sharding))
        logits = np.array(it.model.logits(it.model(batch, it.router_bias, models.COMPUTE).hidden))[0, 2]
    for client, penalty in ((plain, 1.0), (seen, 3.0)):
        expected = logits.copy()
        for token in (1, 3, 4):
            expected[token] = expected[token] / penalty if expected[token] > 0 else expected[token] * penalty
        expected = jax.nn.log_softmax(expected)
        for token, logprob in client.said[0].top:
            np.testing.assert_allclose(logprob, expected[token], atol=1e-4)


def test_logprobs_of_the_prompt_are_those_of_the_full_forward_pass():
    client = Client(PROMPTS[2], logprobs=0, prompt_logprobs=3, max_tokens=1)
    serve([Client(PROMPTS[2])])
    engine = serve([client])
    assert engine.counts["cached_tokens"] == 0  # what is in the cache has no logits
    it = loaded()
    with jax.set_mesh(it.mesh):
        batch = models.pack([[20]], 20)
        batch = batch.replace(tokens=jax.device_put(np.array([PROMPTS[2]], np.int32), batch.tokens.sharding))
        logits = it.model.logits(it.model(batch, it.router_bias, models.COMPUTE).hidden)[0]
        logp = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    assert [one.token for one in client.request.prompt_said] == PROMPTS[2][1:]
    for at, one in enumerate(client.request.prompt_said):
        np.testing.assert_allclose(one.logprob, logp[at, one.token], atol=1e-4)
        assert len(one.top) == 3 and one.top[0][0] == np.argmax(logp[at])
    np.testing.assert_allclose(client.said[0].logprob, logp[19].max(), atol=1e-4)


def test_a_prompt_that_lost_its_pages_while_it_was_read_is_told_once():
    client, it = Client(PROMPTS[2], prompt_logprobs=1), loaded()
    with jax.set_mesh(it.mesh):
        engine = Engine(it, EngineConfig(**OPTIONS))
        engine.submit(client.request)
        engine.step()
        assert 0 < client.request.length < 20
        engine._preempt(client.request)
        engine.run()
    assert [one.token for one in client.request.prompt_said] == PROMPTS[2][1:]
    assert engine.counts["prompt_tokens"] == 20
    assert client.tokens == alone(tuple(PROMPTS[2]))


@pytest.mark.parametrize("rows", [4])
def test_prompts_that_are_read_together_give_the_same_texts(rows):
    clients = [Client(prompt) for prompt in [*PROMPTS, PROMPTS[2], PROMPTS[2]]]
    engine = serve(clients, prefill_rows=rows, max_rows=8)
    for client in clients:
        assert client.tokens == alone(tuple(client.request.prompt))
    assert engine.counts["cached_tokens"] == 2 * 16  # who begins alike waits for the one that reads
    one_by_one = serve([Client(prompt) for prompt in PROMPTS], max_rows=8)
    assert engine.counts["prefill_steps"] < one_by_one.counts["prefill_steps"]


def test_with_new_weights_nothing_is_left_of_the_old_ones():
    it, prompt = loaded(), PROMPTS[2]
    first, again, other = (Client(prompt, logprobs=0, keep_experts=True) for _ in range(3))
    with jax.set_mesh(it.mesh):
        model, bias = models.draw(CFG, seed=7)
        engine = Engine(it, EngineConfig(**OPTIONS))
        engine.submit(first.request)
        with pytest.raises(ValueError, match=r"^renew: 1 requests are not done; expected none$"):
            engine.renew(model, bias)
        engine.step()
        with pytest.raises(ValueError, match=r"^renew: 1 requests are not done; expected none$"):
            engine.renew(model, bias)
        engine.run()
        engine.renew(model, bias)
        engine.submit(again.request)
        engine.run()
        new = Engine(dataclasses.replace(it, model=model, router_bias=bias), EngineConfig(**OPTIONS))
        new.submit(other.request)
        new.run()
    assert first.tokens == alone(tuple(prompt)) != again.tokens
    assert again.request.n_cached == 0
    assert [(o.token, o.logprob) for o in again.said] == [(o.token, o.logprob) for o in other.said]
    np.testing.assert_array_equal(again.request.prompt_experts, other.request.prompt_experts)


@pytest.mark.parametrize("options", [{}, {"cache_tokens": 68, "max_rows": 6}, {"prefill_rows": 4}], ids=str)
def test_experts_of_prompts_and_texts_are_those_of_the_full_forward_pass(options):
    """Of shared chunks, too, and where pages ran out in between."""
    prompts = [*PROMPTS, PROMPTS[2], [*PROMPTS[2][:18], 40]]
    clients = [Client(prompt, keep_experts=True, max_tokens=11) for prompt in prompts]
    engine = serve(clients, n_draft=0, **options)
    assert sum(client.request.n_cached for client in clients) > 0
    assert (engine.counts["preemptions"] > 0) == ("cache_tokens" in options)
    it = loaded()
    with jax.set_mesh(it.mesh):
        batch = models.pack([[len(c.request.tokens)] for c in clients], 32)
        tokens = np.zeros((len(clients), 32), np.int32)
        for row, client in enumerate(clients):
            tokens[row, : len(client.request.tokens)] = client.request.tokens
        batch = batch.replace(tokens=jax.device_put(tokens, batch.tokens.sharding))
        chosen = np.sort(models.chosen_experts(it.model, it.router_bias, batch, models.COMPUTE), axis=-1)
    for row, client in enumerate(clients):
        n = len(client.request.prompt)
        np.testing.assert_array_equal(np.sort(client.request.prompt_experts, axis=-1), chosen[:, row, :n])
        said = np.stack([one.experts for one in client.said], axis=1)
        np.testing.assert_array_equal(np.sort(said, axis=-1), chosen[:, row, n - 1 : n + 10])


def test_experts_that_nobody_asked_for_are_not_known():
    first, second = Client(PROMPTS[2]), Client(PROMPTS[2], keep_experts=True)
    it = loaded()
    with jax.set_mesh(it.mesh):
        engine = Engine(it, EngineConfig(**OPTIONS))
        for client in (first, second):
            engine.submit(client.request)
            engine.run()
    experts = second.request.prompt_experts
    assert second.request.n_cached == 16 and np.all(experts[:, :16] == -1) and np.all(experts[:, 16:] >= 0)


class Even:
    """A grammar of even tokens."""

    ended = False

    active = True

    def __init__(self):
        self.came = []

    def forbidden(self):
        return np.arange(CFG.vocab_size) % 2 == 1

    def advance(self, token):
        self.came.append(token)


def test_a_grammar_says_what_comes_next():
    grammar = Even()
    client, other = Client([3, 1, 4], grammar=grammar), Client([3, 1, 4])
    serve([client, other])
    assert grammar.came == client.tokens and not any(token % 2 for token in client.tokens)
    assert other.tokens == alone((3, 1, 4))


def test_expert_load_counts_every_token_once():
    clients = [Client(prompt) for prompt in PROMPTS]
    engine = serve(clients)
    n = sum(len(c.request.tokens) - 1 for c in clients)  # the last one never goes through the model
    drafted = engine.load.sum(axis=1) - n * CFG.num_experts_per_tok
    assert np.all(drafted >= 0) and np.all(drafted <= CFG.num_experts_per_tok * len(clients))
    assert engine.load.shape == (1, CFG.n_routed_experts)


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"fsdp": 1}, id="one device"),
        pytest.param({"expert": 2, "tensor": 2}, id="four", marks=pytest.mark.slow),
    ],
)
def test_experts_of_several_places_that_change_give_the_same_texts(sizes):
    clients = [Client(prompt) for prompt in PROMPTS]
    options = {"redundant_experts": 4, "rebalance_steps": 3, "cache_tokens": 320}
    engine = serve(clients, sizes=tuple(sizes.items()), **options)
    assert engine.counts["rebalances"] > 2
    assert engine.placement.count.sum() == CFG.n_routed_experts + 4 and engine.placement.count.max() > 1
    for prompt, client in zip(PROMPTS, clients):
        assert client.tokens == alone(tuple(prompt))


def test_places_that_no_device_can_share_are_refused():
    it = loaded(expert=2, tensor=2)
    with (
        jax.set_mesh(it.mesh),
        pytest.raises(ConfigError, match="redundant_experts=3: 11 places do not divide by expert=2; the nearest is 2"),
    ):
        Engine(it, EngineConfig(**OPTIONS, redundant_experts=3))


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"data": 2}, id="data", marks=pytest.mark.slow),
        pytest.param({"expert": 2, "tensor": 2}, id="expert and tensor"),
    ],
)
def test_a_mesh_gives_the_same_texts(sizes):
    clients = [Client(prompt) for prompt in PROMPTS]
    engine = serve(clients, sizes=tuple(sizes.items()), cache_tokens=160)
    assert len(engine.pools) == 2
    for prompt, client in zip(PROMPTS, clients):
        assert client.tokens == alone(tuple(prompt))


@pytest.mark.slow
def test_a_kernel_that_reads_pages_in_place_gives_the_same_texts(monkeypatch):
    monkeypatch.setitem(paged_attention.IMPLEMENTATION_BY_PLATFORM, "cpu", "pallas_interpret")  # writes whole pages
    interpreted = paged_attention.IMPLEMENTATIONS["pallas_interpret"]
    monkeypatch.setitem(paged_attention.IMPLEMENTATIONS, "pallas_tpu", interpreted)
    monkeypatch.setattr(paged_attention, "_UNSUPPORTED", {})
    it = loaded(data=2, tensor=2)
    compute = replace(models.COMPUTE, latent_attention="pallas_tpu")
    it = dataclasses.replace(it, config=replace(it.config, compute=compute))
    clients = [Client(prompt) for prompt in PROMPTS]
    with jax.set_mesh(it.mesh):
        engine = Engine(it, EngineConfig(**OPTIONS, n_draft=1))
        for client in clients:
            engine.submit(client.request)
        engine.run()
    monkeypatch.undo()
    assert [client.tokens for client in clients] == [alone(tuple(prompt)) for prompt in PROMPTS]


def test_drafts_that_do_not_pay_are_left_out_and_tried_again():
    pace = module._Pace(1)
    for _ in range(4):
        pace.took(1, True, 1.5, [1])
        pace.took(1, False, 1.0, [])
    for _ in range(200):
        pace.took(1, True, 1.5, [1])  # nothing is ever accepted
    assert pace.tokens < 1.1
    said = [pace.drafting(1) for _ in range(1000)]
    assert 0 < sum(said) < 100
    for _ in range(300):
        pace.took(1, True, 1.5, [2])
    assert sum(pace.drafting(1) for _ in range(1000)) > 900


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, "prompt: expected at least one token"),
        ({"prompt": [99]}, "prompt: token 99; expected 0 to 47"),
        ({"max_tokens": 62}, r"max_tokens=62: expected at most 61 after a prompt of 3 tokens, as there is room for 64"),
        ({"max_tokens": 0}, "max_tokens=0: expected a whole number greater than 0"),
        ({"temperature": float("nan")}, "temperature=nan: expected 0 to 100"),
        ({"top_p": 1.5}, "top_p=1.5: expected 0 to 1"),
        ({"logprobs": 21}, "logprobs=21: expected 0 to 20"),
        ({"logit_bias": {50: 1.0}}, r"logit_bias=\{50: 1.0\}: expected a token below 48 and -100 to 100"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_in_one_line(options, message):
    with jax.set_mesh(loaded().mesh):
        engine = Engine(loaded(), EngineConfig(**OPTIONS))
    with pytest.raises(ConfigError, match=f"^{message}$"):
        engine.submit(Request(**{"prompt": [1, 2, 3]} | options))
    assert not engine.busy
