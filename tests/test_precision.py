"""Recipes: which matmuls of a training step are quantised, and that the step is near that of bfloat16."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest

from dsjax.config import ComputeConfig, ConfigError, from_dict, replace
from dsjax.precision import RECIPES, cast_weights
from dsjax.train.step import train_step
from pallas_kernels import quantise, scaled_linear
from sharding.mesh import make_mesh

MODEL = models.v3(num_hidden_layers=2)  # a dense layer, a MoE layer, and one of MTP
FP8 = [name for name, recipe in RECIPES.items() if recipe.mlp]


@pytest.fixture(scope="module", autouse=True)
def float32_between_matmuls():
    """So that what is rounded differently is E4M3 alone, and no token goes to another expert for bfloat16's sake."""
    with pytest.MonkeyPatch.context() as patch:
        for name in FP8:
            patch.setitem(RECIPES, name, dataclasses.replace(RECIPES[name], dtype="float32"))
        yield


def config(precision, **changes):
    compute = replace(models.COMPUTE, precision=precision)
    return models.config(MODEL, batch_size=16, compute=compute, **changes)


@functools.cache
def step(precision, **sizes):
    """(loss, gradients by name) of a step on a mesh of these sizes, 128 tokens a device on two."""
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    with jax.set_mesh(make_mesh(devices, **sizes)):
        batch = models.micro_batches(models.pack([[16], [7, 9]] * 8), 1)
        run = jax.jit(functools.partial(train_step, config=config(precision)))
        state, metrics = run(models.state(config(precision)), batch, models.knobs())
        return float(metrics.loss), models.named_leaves(state.opt_state[0].mu)


def test_every_recipe_has_a_name_in_the_configuration_and_an_unknown_one_is_refused():
    for name in RECIPES:
        assert ComputeConfig(precision=name).precision == name
    with pytest.raises(ConfigError, match="precision=fp9: expected one of float32, bf16, fp8_deepseek,"):
        from_dict({"compute": {"precision": "fp9"}})


def test_the_matmuls_of_the_papers_list_are_quantised_and_no_other(one_device, monkeypatch):
    seen = {"forward": set(), "input gradient": set(), "weight gradient": set()}
    matmul, gradient = scaled_linear.scaled_matmul, scaled_linear.scaled_gradient

    def note_matmul(x, w, *args, transposed=False, **options):
        seen["input gradient" if transposed else "forward"].add(w.values.shape)
        return matmul(x, w, *args, transposed=transposed, **options)

    def note_gradient(x, dy, group_sizes, **options):
        groups = () if group_sizes is None else group_sizes.shape
        seen["weight gradient"].add((*groups, x.values.shape[1], dy.values.shape[1]))
        return gradient(x, dy, group_sizes, **options)

    monkeypatch.setattr(scaled_linear, "scaled_matmul", note_matmul)
    monkeypatch.setattr(scaled_linear, "scaled_gradient", note_gradient)
    m, fp8 = MODEL, config("fp8_deepseek")
    batch = models.micro_batches(models.pack([[16]] * 16), 1)
    jax.eval_shape(functools.partial(train_step, config=fp8), models.state(fp8), batch, models.knobs())
    h, d, f, e = m.num_attention_heads, m.hidden_size, m.moe_intermediate_size, m.n_routed_experts
    wanted = {
        (d, m.q_lora_rank),
        (m.q_lora_rank, h * m.qk_head_dim),
        (d, m.kv_lora_rank + m.qk_rope_head_dim),
        (m.kv_lora_rank, h * (m.qk_nope_head_dim + m.v_head_dim)),
        (h * m.v_head_dim, d),
        (d, m.intermediate_size),
        (m.intermediate_size, d),
        (e, d, f),
        (e, f, d),
        (d, m.n_shared_experts * f),
        (m.n_shared_experts * f, d),
    }
    assert seen == dict.fromkeys(seen, wanted)  # not the head, the router, eh_proj or the embedding


def difference(gradients, wanted):
    """Of all gradients together: the difference over the size."""
    error = sum(np.sum((gradients[name] - wanted[name]) ** 2) for name in wanted)
    return np.sqrt(error / sum(np.sum(a**2) for a in wanted.values()))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"expert": 2, "tensor": 2}])
def test_with_operands_that_are_not_rounded_the_step_is_that_of_float32(sizes, monkeypatch):
    """All that FP8 goes through, but for the rounding to E4M3: tiles, what is kept, experts' rows aligned, meshes."""
    monkeypatch.setattr(quantise, "E4M3", jnp.float32)
    loss, gradients = step.__wrapped__("fp8_deepseek", **sizes)
    wanted_loss, wanted = step("float32")
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    for name, gradient in gradients.items():
        limit = 1e-4 * np.max(np.abs(wanted[name]), initial=0)
        np.testing.assert_allclose(gradient, wanted[name], atol=limit, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("precision", FP8)
def test_the_loss_of_a_step_is_near_that_of_float32(precision):
    loss, gradients = step(precision)
    wanted_loss, wanted = step("float32")
    assert loss != wanted_loss
    assert loss == pytest.approx(wanted_loss, rel=0.01)
    assert 0 < difference(gradients, wanted) < 1  # tokens that go to other experts, too


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["expert", "fsdp"])
def test_a_step_is_the_same_on_two_devices_of(axis):
    loss, gradients = step("fp8_deepseek", **{axis: 2})
    wanted_loss, wanted = step("fp8_deepseek")
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert difference(gradients, wanted) < 0.01  # sums in another order, and then values of E4M3 next to one another


def test_weights_are_cast_but_for_norms_and_routers(one_device):
    model, _ = models.draw(MODEL)
    cast = models.named_leaves(cast_weights(model, "bf16"))
    for name, leaf in cast.items():
        wanted = jnp.float32 if "router" in name or name.endswith("scale") else jnp.bfloat16
        assert leaf.dtype == wanted, name
