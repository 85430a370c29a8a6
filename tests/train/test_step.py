"""One training step: what moves, by how much, and what does not."""

import functools

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest

from dsjax.config import replace
from dsjax.train.step import heldout_nats, train_step

pytestmark = pytest.mark.usefixtures("one_device")

T = 16
ROWS = [[7, 6], [16], [3, 4, 5], [10]]
CONFIG = models.config(models.v3())
CONFIG = replace(CONFIG, optimizer=replace(CONFIG.optimizer, ema_decay=0.9, clip_norm=0.1))


step = jax.jit(functools.partial(train_step, config=CONFIG))


def batch(rows=ROWS, n=1):
    return models.micro_batches(models.pack(rows, T), n)


@functools.cache
def first_step():
    """(state before, state after, metrics)."""
    before = models.state(CONFIG)
    return before, *step(before, batch(), models.knobs())


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_every_parameter_of_every_layer_has_a_gradient_and_moves():
    before, after, metrics = first_step()
    old, new = models.named_leaves(before.model), models.named_leaves(after.model)
    assert int(metrics.skipped) == 0
    models.assert_every_layer_moves({name: new[name] - old[name] for name in old})
    # The decay alone would move matrices: the first moments are of gradients.
    models.assert_every_layer_moves(models.named_leaves(after.opt_state[0].mu))


def test_the_update_is_adamw_of_the_clipped_gradient_and_norms_do_not_decay():
    before, after, metrics = first_step()
    config, rate = CONFIG.optimizer, models.KNOBS["learning_rate"]
    moments = models.named_leaves(after.opt_state[0].mu)
    old, new = models.named_leaves(before.model), models.named_leaves(after.model)
    norm = np.sqrt(sum(np.sum((m / (1 - config.b1)) ** 2) for m in moments.values()))
    assert float(metrics.grad_norm) > config.clip_norm
    assert norm == pytest.approx(config.clip_norm, rel=1e-5)
    for key, m in moments.items():
        g = m.astype(np.float64) / (1 - config.b1)
        decay = 0.0 if key.endswith("scale") else config.weight_decay
        update = g / (np.abs(g) + config.eps) + decay * old[key]  # the first step: both moments are of one gradient
        np.testing.assert_allclose(new[key], old[key] - rate * update, atol=2e-6, err_msg=key)


def test_the_router_bias_moves_by_exactly_its_speed_against_the_load():
    before, after, metrics = first_step()
    speed = np.float32(models.KNOBS["bias_update_speed"])
    for old, new, load in zip(
        jax.tree.leaves(before.router_bias),
        jax.tree.leaves(after.router_bias),
        jax.tree.leaves(metrics.load),
        strict=True,
    ):
        load = np.asarray(load)
        sign = np.sign(load.mean(axis=1, keepdims=True) - load)
        assert np.any(sign > 0) and np.any(sign < 0)
        np.testing.assert_array_equal(new, np.asarray(old) + speed * sign)
    np.testing.assert_array_equal(
        jnp.sum(metrics.load.moe, axis=1), sum(map(sum, ROWS)) * CONFIG.model.num_experts_per_tok
    )
    every = np.concatenate([np.asarray(a) for a in jax.tree.leaves(metrics.load)])
    np.testing.assert_allclose(metrics.max_vio, every.max(axis=1) / every.mean(axis=1) - 1, rtol=1e-6)


def test_the_average_of_weights_follows_at_its_decay():
    before, after, _ = first_step()
    old, new, ema = (models.named_leaves(a) for a in (before.ema, after.model, after.ema))
    for key in old:
        np.testing.assert_allclose(ema[key], 0.9 * old[key] + 0.1 * new[key], atol=1e-6)


@pytest.mark.parametrize("where", ["a weight", "the loss"])
def test_a_step_with_nan_changes_nothing_but_the_counts(where):
    _, good, _ = first_step()
    knobs = models.knobs(mtp_weight=float("nan")) if where == "the loss" else models.knobs()
    if where == "a weight":
        good = good.replace(model=poison(good.model))
    bad, metrics = step(good, batch(), knobs)
    for part in ("model", "opt_state", "router_bias", "ema"):
        assert_equal(getattr(bad, part), getattr(good, part))
    assert (int(bad.step), int(bad.skipped), int(bad.skipped_in_a_row)) == (2, 1, 1)
    assert not np.isfinite(metrics.grad_norm)
    if where == "the loss":
        worse, _ = step(bad, batch(), knobs)
        assert (int(worse.skipped), int(worse.skipped_in_a_row)) == (2, 2)
        well, metrics = step(worse, batch(), models.knobs())
        assert (int(well.step), int(well.skipped), int(well.skipped_in_a_row)) == (4, 2, 0)
        assert int(metrics.skipped) == 2
        assert np.any(np.asarray(well.model.head[...]) != np.asarray(worse.model.head[...]))


def poison(model):
    def put(path, leaf):
        bad = np.full(leaf.shape, np.nan, np.float32)
        return jax.device_put(bad, leaf.sharding) if models.weight_name(path) == "moe/attn/wo" else leaf

    return jax.tree_util.tree_map_with_path(put, model)


def assert_same_step(a, b):
    """Metrics, gradients and biases of two steps are equal but for the order of sums."""
    (state, metrics), (wanted, wanted_metrics) = a, b
    parts = (metrics, state.opt_state, state.router_bias), (wanted_metrics, wanted.opt_state, wanted.router_bias)
    for x, y in zip(*map(jax.tree.leaves, parts), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_four_micro_batches_make_the_step_of_one_batch():
    before, *whole = first_step()
    assert_same_step(step(before, batch(n=4), models.knobs(micro_batches=4)), whole)


def test_a_ramp_takes_the_first_micro_batches_as_if_the_batch_were_smaller():
    before, *_ = first_step()
    rows = [*ROWS[:2], [], []]
    ramped = step(before, batch(rows, n=4), models.knobs(micro_batches=2))
    assert_same_step(ramped, step(before, batch(rows), models.knobs()))


def test_heldout_nats_are_the_loss_times_the_tokens():
    before, _, metrics = first_step()
    nats, tokens, no_room = jax.jit(functools.partial(heldout_nats, config=CONFIG))(
        before.model, models.pack(ROWS, T), before.router_bias
    )
    assert float(tokens) == sum(length - 1 for row in ROWS for length in row)
    assert float(no_room) == 0
    assert float(nats / tokens) == pytest.approx(float(metrics.loss), rel=1e-5)
