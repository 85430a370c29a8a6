"""The average of the weights on the host: that of the devices, in step with them, and nothing waits for it."""

import threading

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from jax import P

from dsjax.config import OptimizerConfig, replace
from dsjax.state import TrainState
from dsjax.train import average
from dsjax.train.average import HostAverage, begin
from sharding.mesh import make_mesh

DECAY = 0.9
CONFIG = models.config(models.v3(), optimizer=OptimizerConfig(ema_decay=DECAY, ema_on="host"))
HISTORY = np.zeros((2, 8), np.float32)
LAYOUTS = {"a": P("fsdp", "expert"), "b": P(None, ("fsdp", "expert")), "c": P()}


def start() -> TrainState:
    """Weights in three layouts, and the average on the devices beside them. Under a mesh."""
    rng = np.random.default_rng(0)
    model = {name: jax.device_put(rng.normal(size=(64, 128)).astype(np.float32), p) for name, p in LAYOUTS.items()}
    counts = [jax.device_put(np.zeros((), np.int32), P()) for _ in range(3)]
    return TrainState(counts[0], model, None, None, jax.tree.map(jnp.copy, model), *counts[1:], HISTORY)


def step(state: TrainState, taken, good) -> TrainState:
    """What a training step does with weights and their average, in little; its memory is given up."""
    model = jax.tree.map(lambda w: jnp.where(taken & good, w - 0.1 * jnp.sin(3 * w), w), state.model)
    ema = jax.tree.map(lambda a, w: jnp.where(taken & good, DECAY * a + (1 - DECAY) * w, a), state.ema, model)
    return state.replace(
        step=state.step + taken,
        model=model,
        ema=ema,
        skipped_in_a_row=jnp.where(taken, jnp.where(good, 0, state.skipped_in_a_row + 1), state.skipped_in_a_row),
    )


step = jax.jit(step, donate_argnums=0)
STEPS = [(True, True)] * 3 + [(True, False)] * 2 + [(False, True)] * 2 + [(True, True)] * 4  # skipped, sent in vain


@pytest.fixture(scope="module")
def mesh():
    with jax.set_mesh(make_mesh(data=2, fsdp=2, expert=2)) as mesh:
        yield mesh


def run(state, kept, steps):
    for taken, good in steps:
        state = step(state, taken, good)
        kept.add(state)
    return state


def assert_same(host: TrainState, devices: TrainState):
    """The same but for rounding, laid out in the same way."""
    for a, b, w in zip(*map(jax.tree.leaves, (host.ema, devices.ema, devices.model)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
        assert a.sharding == b.sharding
        assert not np.allclose(a, w, atol=1e-3)


def test_the_average_on_the_host_is_that_on_the_devices(mesh):
    state = start()
    _, kept = begin(CONFIG, state.replace(ema=None))
    state = run(state, kept, STEPS)
    assert_same(kept.join(state), state)
    assert kept.step == 9


def test_it_goes_on_from_what_a_checkpoint_holds_bit_for_bit(mesh):
    state = start()
    _, whole = begin(CONFIG, state)
    state = run(state, whole, STEPS[:5])
    saved = jax.tree.map(jnp.copy, whole.join(state))
    without, resumed = begin(CONFIG, saved)
    assert without.ema is None
    state = run(state, whole, STEPS[5:])
    again = run(saved, resumed, STEPS[5:])
    for a, b in zip(*(jax.tree.leaves(k.join(s).ema) for k, s in ((whole, state), (resumed, again))), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_a_checkpoint_was_given_does_not_change_later(mesh):
    state = start()
    _, kept = begin(CONFIG, state)
    state = run(state, kept, STEPS[:1])
    given = kept.join(state).ema
    before = jax.tree.map(np.array, given)
    run(state, kept, STEPS[:3])
    kept._pool.shutdown()
    for a, b in zip(*map(jax.tree.leaves, (given, before))):
        np.testing.assert_array_equal(a, b)


def test_steps_go_on_while_it_averages_and_wait_once_two_copies_lie_there(mesh, monkeypatch):
    state, gate, average_of = start(), threading.Event(), average._average
    monkeypatch.setattr(average, "_average", lambda *args: (gate.wait(30), average_of(*args)))
    _, kept = begin(CONFIG, state)
    state = run(state, kept, STEPS[:2])  # no average was made, and nothing waited
    assert kept.step <= 1 and not any(future.done() for future in kept._pending)
    third = threading.Thread(target=lambda: run(state, kept, STEPS[:1]))
    third.start()
    third.join(0.3)
    assert third.is_alive()
    gate.set()
    third.join(30)
    assert not third.is_alive()


def test_a_state_of_another_step_is_refused(mesh):
    state = start()
    _, kept = begin(CONFIG, state)
    state = step(step(state, True, True), True, True)
    kept.add(state)
    with pytest.raises(RuntimeError, match="the average is of step 0 and was given step 2"):
        kept.join(state)


def test_on_the_devices_or_without_a_decay_there_is_nothing_to_do(mesh):
    for changes in ({"ema_on": "device"}, {"ema_decay": None}):
        config = replace(CONFIG, optimizer=replace(CONFIG.optimizer, **changes))
        state = start()
        same, kept = begin(config, state)
        kept.add(same)
        assert same is state and kept.join(same) is state and not isinstance(kept, HostAverage)
