"""The loss: chunked cross-entropy against Optax, the whole against plain loops, and the same however it is computed."""

import functools

import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import pytest

from dsjax.config import replace
from dsjax.precision import cast_weights
from dsjax.train import loss as loss_module
from dsjax.train.loss import count, cross_entropy, total_loss
from sharding.rules import spec

pytestmark = pytest.mark.usefixtures("one_device")

B, T, D, V = 2, 16, 8, models.VOCAB
CONFIG = models.config(models.v3())
TRUNK = models.config(models.v3(num_nextn_predict_layers=0))
ROWS = [[7, 6], [16], [3, 4, 5], [10]]
MTP_WEIGHT = 0.3


@pytest.mark.parametrize("tokens_a_chunk", [5, 16, 1000])
def test_cross_entropy_and_its_gradients_equal_optax_on_whole_logits(tokens_a_chunk, monkeypatch):
    monkeypatch.setattr(loss_module, "_CHUNK_ELEMENTS", tokens_a_chunk * V)
    monkeypatch.setattr(loss_module, "_CHUNK_TOKENS", 1)
    rng = np.random.default_rng(0)
    hidden = jax.device_put(rng.normal(size=(B, T, D)).astype(np.float32), spec("batch", "seq", None))
    head = jax.device_put(rng.normal(size=(D, V)).astype(np.float32), spec("embed", "vocab"))
    targets = jax.device_put(rng.integers(V, size=(B, T)).astype(np.int32), spec("batch", "seq"))
    valid = jax.device_put(rng.random((B, T)) < 0.7, spec("batch", "seq"))

    def ours(hidden, head):
        return 1.7 * cross_entropy(hidden, head, targets, valid)

    got, gradients = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(hidden, head)

    with jax.set_mesh(None):
        plain = [jnp.asarray(np.asarray(a)) for a in (hidden, head, targets, valid)]

        def whole(hidden, head):
            nats = optax.softmax_cross_entropy_with_integer_labels(hidden @ head, plain[2])
            return 1.7 * jnp.sum(jnp.where(plain[3], nats, 0))

        wanted, wanted_gradients = jax.value_and_grad(whole, argnums=(0, 1))(*plain[:2])
    assert float(got) == pytest.approx(float(wanted), rel=1e-6)
    for a, b in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(gradients[0])[~np.asarray(valid)], 0)


def test_large_logits_do_not_overflow():
    one = jax.device_put(np.ones((1, 1, 1), np.float32), spec("batch", "seq", None))
    head = jax.device_put(np.asarray([[1e4, 0, -1e4]], np.float32), spec("embed", "vocab"))
    at = [jax.device_put(np.full((1, 1), value), spec("batch", "seq")) for value in (np.int32(1), True)]
    assert float(cross_entropy(one, head, *at)) == pytest.approx(1e4)


def loss(model, bias, batch, config):
    counts = count(jax.tree.map(lambda a: a[None], batch), config.model.num_nextn_predict_layers)
    model = cast_weights(model, config.compute.precision)
    return total_loss(model, batch, bias, counts, jnp.float32(MTP_WEIGHT), config)


evaluate = jax.jit(loss, static_argnames="config")
differentiate = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnames="config")


@functools.cache
def result(config):
    """((loss, its parts), gradients)."""
    model, bias = models.draw(config.model)
    return differentiate(model, bias, models.pack(ROWS, T), config)


def compute(**changes):
    return replace(TRUNK, compute=replace(TRUNK.compute, **changes))


def assert_same(a, b, tolerance=1e-5):
    """Loss, parts and gradients are equal to within tolerance of the largest."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(1.0, np.abs(y).max(initial=0)))


def test_the_loss_is_what_plain_loops_over_positions_give():
    model, bias = models.draw(CONFIG.model)
    batch = models.pack(ROWS, T)
    tokens, segments = np.asarray(batch.tokens), np.asarray(batch.segment_ids)
    out = jax.jit(lambda m, batch: m(batch, bias, CONFIG.compute, CONFIG.balance))(model, batch)
    means = []
    for ahead, hidden in enumerate((out.hidden, *out.mtp_hidden), 1):
        logits = np.asarray(hidden, np.float64) @ np.asarray(model.head[...], np.float64)
        nats = []
        for b in range(len(ROWS)):
            for i in range(T - ahead):
                if segments[b, i] and segments[b, i] == segments[b, i + ahead]:
                    scores = logits[b, i]
                    nats.append(
                        np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[tokens[b, i + ahead]]
                    )
        means.append(np.mean(nats))
    balance = sum(float(a) for a in out.balance.values()) / len(ROWS)
    total, parts = evaluate(model, bias, batch, CONFIG)
    assert float(parts.loss) == pytest.approx(means[0], rel=1e-5)
    np.testing.assert_allclose(parts.mtp_loss, means[1:], rtol=1e-5)
    assert float(parts.balance) == pytest.approx(balance, rel=1e-5)
    assert float(total) == pytest.approx(means[0] + MTP_WEIGHT * means[1] + balance, rel=1e-5)
    assert float(jnp.sum(parts.load.moe[0])) == segments.astype(bool).sum() * CONFIG.model.num_experts_per_tok


@pytest.mark.parametrize(
    "changes",
    [{"scan_layers": False}, {"remat": "full"}, {"remat": "deepseek", "grouped_matmul": "auto"}],
    ids=lambda changes: ",".join(f"{name}={value}" for name, value in changes.items()),
)
def test_the_loss_and_its_gradients_are_the_same_with(changes):
    assert_same(result(compute(**changes)), result(TRUNK))


def test_the_loss_is_the_same_for_packed_documents_and_for_a_row_each():
    packed = models.pack([[7, 6], [9, 5], [], []], T)
    tokens, segments, positions = (np.zeros((4, T), np.int32) for _ in range(3))
    places = [(0, 0, 7), (0, 7, 6), (1, 0, 9), (1, 9, 5)]
    for row, (b, start, length) in enumerate(places):
        tokens[row, :length] = np.asarray(packed.tokens)[b, start : start + length]
        segments[row, :length], positions[row, :length] = 1, np.arange(length)
    put = functools.partial(jax.device_put, device=packed.tokens.sharding)
    alone = packed.replace(tokens=put(tokens), segment_ids=put(segments), positions=put(positions))
    model, bias = models.draw(CONFIG.model)
    (_, got), (_, wanted) = (evaluate(model, bias, batch, CONFIG) for batch in (packed, alone))
    # All but the sequence-wise balance loss, which is of rows.
    assert_same((got.loss, got.mtp_loss, got.load), (wanted.loss, wanted.mtp_loss, wanted.load))


def test_bfloat16_is_near_float32():
    every = replace(TRUNK.model, num_experts_per_tok=TRUNK.model.n_routed_experts, topk_group=TRUNK.model.n_group)
    exact = replace(TRUNK, model=every)  # every expert is chosen: rounding changes no choice
    (wanted, _), wanted_gradients = result(exact)
    (got, _), gradients = result(replace(exact, compute=replace(exact.compute, precision="bf16")))
    assert float(got) == pytest.approx(float(wanted), rel=0.01)
    assert got.dtype == jnp.float32
    wanted_gradients = models.named_leaves(wanted_gradients)
    for name, gradient in models.named_leaves(gradients).items():
        assert gradient.dtype == np.float32
        a, b = gradient.ravel(), wanted_gradients[name].ravel()
        assert a.size == 0 or a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.99, name


@pytest.mark.parametrize("model", [models.v2(), models.moe()], ids=["v2", "moe"])
def test_every_parameter_of_every_layer_has_a_gradient(model):
    _, gradients = result(models.config(model))
    models.assert_every_layer_moves(models.named_leaves(gradients))
