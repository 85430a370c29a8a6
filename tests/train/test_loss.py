"""The loss: chunked cross-entropy against Optax, the whole against plain loops, and the same however it is computed."""

import functools

import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import pytest

from dsjax.config import BalanceConfig, replace
from dsjax.precision import cast_weights
from dsjax.train import loss as loss_module
from dsjax.train.loss import count, cross_entropy, total_loss
from sharding.rules import spec

pytestmark = pytest.mark.usefixtures("one_device")

B, T, D, V = 2, 16, 8, models.VOCAB
CONFIG = models.config(models.v3())
ROWS = [[7, 6], [16], [3, 4, 5], [10]]
MTP_WEIGHT = 0.3


@pytest.mark.parametrize("tokens_a_chunk", [5, 16, 1000])
def test_cross_entropy_and_its_gradients_equal_optax_on_whole_logits(tokens_a_chunk, monkeypatch):
    monkeypatch.setattr(loss_module, "_CHUNK_ELEMENTS", tokens_a_chunk * V)
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


@functools.partial(jax.jit, static_argnames="config")
def evaluate(model, bias, batch, config):
    """(loss, its parts, gradients)."""
    counts = count(jax.tree.map(lambda a: a[None], batch), config.model.num_nextn_predict_layers)

    def loss(model):
        model = cast_weights(model, config.compute.dtype)
        return total_loss(model, batch, bias, counts, jnp.float32(MTP_WEIGHT), config)

    (total, parts), gradients = jax.value_and_grad(loss, has_aux=True)(model)
    return total, parts, gradients


@functools.cache
def result(config, rows=tuple(map(tuple, ROWS))):
    model, bias = models.draw(config.model)
    return evaluate(model, bias, models.pack(rows, T), config)


def compute(config=CONFIG, **changes):
    return replace(config, compute=replace(config.compute, **changes))


def assert_same(a, b, tolerance=1e-5):
    """Loss, parts and gradients are equal to within tolerance of the largest."""
    assert float(a[0]) == pytest.approx(float(b[0]), rel=tolerance)
    for x, y in zip(jax.tree.leaves(a[1:]), jax.tree.leaves(b[1:]), strict=True):
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
                    nats.append(np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[tokens[b, i + ahead]])
        means.append(np.mean(nats))
    balance = sum(float(a) for a in out.balance.values()) / len(ROWS)
    total, parts, _ = result(CONFIG)
    assert float(parts.loss) == pytest.approx(means[0], rel=1e-5)
    np.testing.assert_allclose(parts.mtp_loss, means[1:], rtol=1e-5)
    assert float(parts.balance) == pytest.approx(balance, rel=1e-5)
    assert float(total) == pytest.approx(means[0] + MTP_WEIGHT * means[1] + balance, rel=1e-5)
    assert float(jnp.sum(parts.load.moe[0])) == segments.astype(bool).sum() * CONFIG.model.num_experts_per_tok


@pytest.mark.parametrize(
    "changes",
    [{"scan_layers": False}, {"remat": "full"}, {"remat": "deepseek"}, {"grouped_matmul": "auto"}],
    ids=lambda changes: "=".join(map(str, *changes.items())),
)
def test_the_loss_and_its_gradients_are_the_same_with(changes):
    assert_same(result(compute(**changes)), result(CONFIG))


def test_the_loss_is_the_same_for_packed_documents_and_for_a_row_each():
    """But for the sequence-wise balance loss, which is of rows."""
    config = replace(CONFIG, balance=BalanceConfig())
    packed = models.pack([[7, 6], [9, 5], [], []], T)
    tokens, segments, positions = (np.zeros((4, T), np.int32) for _ in range(3))
    places = [(0, 0, 7), (0, 7, 6), (1, 0, 9), (1, 9, 5)]
    for row, (b, start, length) in enumerate(places):
        tokens[row, :length] = np.asarray(packed.tokens)[b, start : start + length]
        segments[row, :length], positions[row, :length] = 1, np.arange(length)
    put = functools.partial(jax.device_put, device=packed.tokens.sharding)
    alone = packed.replace(tokens=put(tokens), segment_ids=put(segments), positions=put(positions))
    model, bias = models.draw(config.model)
    assert_same(evaluate(model, bias, packed, config), evaluate(model, bias, alone, config))


def test_bfloat16_is_near_float32():
    exact, rough = result(CONFIG), result(compute(dtype="bfloat16"))
    assert rough[0].dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(rough[2])} == {jnp.dtype("float32")}
    assert float(rough[0]) == pytest.approx(float(exact[0]), rel=0.02)
    a, b = (np.concatenate([np.ravel(g) for g in jax.tree.leaves(r[2])]) for r in (exact, rough))
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.98
