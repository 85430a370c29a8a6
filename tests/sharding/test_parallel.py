"""Parallelism changes time, never numbers: a training step on fake devices against one."""

import functools
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import models
import numpy as np
import pytest

from dsjax.config import Config, replace
from dsjax.model import moe
from dsjax.train.step import train_step
from sharding.mesh import make_mesh
from sharding.rules import as_rows, as_tokens, halves, join, spec

MODEL = models.v3(num_hidden_layers=1, first_k_dense_replace=0)  # a MoE layer in the trunk, one in MTP
ROWS = [[7, 6], [16], [3, 4, 5], [10], [16], [8, 8], [2, 3], [9]]
AXES = ("data", "fsdp", "expert", "context", "tensor")
QUICK = [{"expert": 2, "fsdp": 2, "tensor": 2}, {"context": 2, "data": 2, "expert": 2}]
SLOW = [dict.fromkeys(axes, 2) for n in (1, 2) for axes in itertools.combinations(AXES, n)] + [{"expert": 8}]
OTHERS = {
    "two levels": ({"expert_groups": 2}, {"expert": 4}),
    "half-batches": ({"overlap": "batch-split"}, {"expert": 2, "fsdp": 2}),
    "room for twice even loads": ({"expert_buffer": 4.0}, {"expert": 4, "tensor": 2}),
    "recomputed": ({"remat": "deepseek", "expert_groups": 2}, {"expert": 4, "context": 2}),
}


def config(model=MODEL, **compute) -> Config:
    """Two micro-batches a step, all losses, an average of the weights."""
    base = models.config(model, batch_size=16, accumulate=2)
    return replace(
        base,
        compute=replace(base.compute, **compute),
        optimizer=replace(base.optimizer, ema_decay=0.9, clip_norm=1e9),
    )


@functools.cache
def step(config: Config, **sizes):
    """(metrics, gradients by name, weights' average by name) of the first step, on a mesh of these sizes."""
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    with jax.set_mesh(make_mesh(devices, **sizes)):
        batch = models.micro_batches(models.pack(ROWS + ROWS[::-1]), 2)
        run = jax.jit(functools.partial(train_step, config=config))
        state, metrics = run(models.state(config), batch, models.knobs(micro_batches=2))
        gradients = models.named_leaves(state.opt_state[0].mu)
        return jax.tree.map(np.asarray, metrics), gradients, models.named_leaves(state.router_bias)


@pytest.fixture(autouse=True)
def no_room_is_cheap(monkeypatch):
    monkeypatch.setattr(moe, "CHEAP_BYTES", 0)


def assert_same_as_on_one_device(config: Config, sizes: dict[str, int]):
    metrics, gradients, bias = step(config, **sizes)
    plain = replace(config, compute=models.COMPUTE)
    wanted_metrics, wanted_gradients, wanted_bias = step(plain)
    assert metrics.loss == pytest.approx(wanted_metrics.loss, rel=1e-5)
    assert metrics.overflow == 0
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), metrics, wanted_metrics)
    for name, wanted in wanted_gradients.items():
        np.testing.assert_allclose(gradients[name], wanted, atol=1e-5 * np.max(np.abs(wanted), initial=0), err_msg=name)
    for name, wanted in wanted_bias.items():
        np.testing.assert_array_equal(bias[name], wanted, err_msg=name)


def named(sizes: dict[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in sizes.items())


@pytest.mark.parametrize("sizes", [*QUICK, *(pytest.param(s, marks=pytest.mark.slow) for s in SLOW)], ids=named)
def test_loss_and_every_gradient_are_the_same_on(sizes):
    assert_same_as_on_one_device(config(), sizes)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_loss_and_every_gradient_are_the_same_with(name):
    compute, sizes = OTHERS[name]
    assert_same_as_on_one_device(config(**compute), sizes)


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["redo", "drop"])
def test_rows_without_room_are_counted_and_the_step_is_not_taken_or_goes_on_without_them(choice):
    short = config(expert_buffer=0.5, on_overflow=choice)
    with jax.set_mesh(make_mesh(jax.devices()[:4], expert=4)):
        batch = models.micro_batches(models.pack(ROWS + ROWS[::-1]), 2)
        before, knobs = models.state(short), models.knobs(micro_batches=2, step=0)
        run = jax.jit(functools.partial(train_step, config=short))
        after, metrics = run(before, batch, knobs)
        late, _ = run(after, batch, knobs | {"step": 1})  # sent before the first one's metrics were seen
    taken = choice == "drop"
    assert metrics.overflow > 0
    assert (int(after.step), int(late.step)) == ((1, 2) if taken else (0, 0))
    assert (int(after.skipped), int(late.skipped)) == (0, 0)
    for one, state in ((after, before), (late, after)):
        same = [
            np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one.model), jax.tree.leaves(state.model)) if a.size
        ]
        assert not any(same) if taken else all(same)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", QUICK, ids=named)
@pytest.mark.parametrize("make", [models.v2, models.moe], ids=lambda make: make.__name__)
def test_and_so_for_the_older_models(make, sizes):
    assert_same_as_on_one_device(config(make(num_hidden_layers=2)), sizes)


@pytest.mark.slow
def test_a_mesh_of_every_axis_at_two():
    """32 fake devices: in a process of its own, as this one has eight."""
    code = (
        "import conftest, jax; jax.config.update('jax_num_cpu_devices', 32); import test_parallel as t; "
        "t.assert_same_as_on_one_device(t.config(remat='deepseek'), dict.fromkeys(t.AXES, 2))"
    )
    here = Path(__file__).parent
    paths = os.pathsep.join(map(str, (here, here.parent, here.parent.parent)))
    environment = os.environ | {"PYTHONPATH": paths}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-2000:]


def test_tokens_become_rows_and_come_back_with_nothing_sent():
    with jax.set_mesh(make_mesh(data=2, context=2, tensor=2)):
        x = np.arange(4.0 * 6 * 2 * 5).reshape(4, 6, 2, 5).astype(np.float32)
        x = jax.device_put(x, spec("batch", "seq", "heads", None))
        there = jax.jit(as_rows).lower(x).compile()
        back = jax.jit(lambda rows, x: as_tokens(rows, x, 2, 5)).lower(there(x), x).compile()
        assert there(x).shape == (24, 10)
        np.testing.assert_array_equal(back(there(x), x), x)
        for program in (there, back):
            assert_nothing_is_sent(program)


def test_half_batches_are_of_each_device_and_come_back_with_nothing_sent():
    with jax.set_mesh(make_mesh(data=4, context=2)):
        x = np.arange(8.0 * 6).reshape(8, 6)
        placed = jax.device_put(x, spec("batch", "seq"))
        apart = jax.jit(lambda x: halves((x, -x))).lower(placed).compile()
        (first, minus), (second, _) = apart(placed)
        together = jax.jit(join).lower(first, second).compile()
        np.testing.assert_array_equal(first, x[::2])
        np.testing.assert_array_equal(minus, -x[::2])
        np.testing.assert_array_equal(together(first, second), x)
        for program in (apart, together):
            assert_nothing_is_sent(program)


def assert_nothing_is_sent(program):
    assert not re.search("all-to-all|all-gather|all-reduce|collective-permute", program.as_text())
