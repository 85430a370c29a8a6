"""Parallelism changes time, never numbers: eight fake devices against one."""

import functools
import re

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest

from dsjax.train.loss import count, total_loss
from sharding.mesh import make_mesh
from sharding.rules import as_rows, as_tokens, spec

MODEL = models.v3(num_hidden_layers=1, first_k_dense_replace=0)  # a MoE layer in the trunk, one in MTP
CONFIG = models.config(MODEL)
MESHES = [{"expert": 2, "fsdp": 2, "tensor": 2}, {"context": 2, "data": 2, "expert": 2}]


@functools.cache
def loss_and_gradients(**sizes):
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    with jax.set_mesh(make_mesh(devices, **sizes)):
        model, bias = models.draw(MODEL)
        batch = models.pack([[7, 6], [16], [3, 4, 5], [10]])

        @jax.jit
        def evaluate(model, batch):
            counts = count(jax.tree.map(lambda a: a[None], batch), 1)
            loss = functools.partial(total_loss, mtp_weight=jnp.float32(0.3), config=CONFIG)
            return jax.value_and_grad(loss, has_aux=True)(model, batch, bias, counts)

        (loss, parts), gradients = evaluate(model, batch)
        return float(loss), jax.tree.map(np.asarray, parts), models.named_leaves(gradients)


@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: ",".join(f"{k}={v}" for k, v in sizes.items()))
def test_loss_and_every_gradient_are_the_same_on(sizes):
    loss, parts, gradients = loss_and_gradients(**sizes)
    wanted, wanted_parts, wanted_gradients = loss_and_gradients()
    assert loss == pytest.approx(wanted, rel=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), parts, wanted_parts)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, wanted_gradients[name], atol=1e-5, err_msg=name)


def test_tokens_become_rows_and_come_back_with_nothing_sent():
    with jax.set_mesh(make_mesh(data=2, context=2, tensor=2)):
        x = np.arange(4.0 * 6 * 2 * 5).reshape(4, 6, 2, 5).astype(np.float32)
        x = jax.device_put(x, spec("batch", "seq", "heads", None))
        there = jax.jit(as_rows).lower(x).compile()
        back = jax.jit(lambda rows, x: as_tokens(rows, x, 2, 5)).lower(there(x), x).compile()
        assert there(x).shape == (24, 10)
        np.testing.assert_array_equal(back(there(x), x), x)
        for program in (there, back):
            assert not re.search("all-to-all|all-gather|all-reduce|collective-permute", program.as_text())
