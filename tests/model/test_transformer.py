"""The whole network: decoding equals the full forward pass, documents do not meet, memory and size are as planned."""

import functools
import math

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from flax import nnx

import configs
from dsjax.config import replace
from dsjax.model.cache import new_pages
from dsjax.model.mla import MLA
from dsjax.model.transformer import DeepSeek, init_router_bias, unstack
from dsjax.plan import count
from dsjax.train.step import init_state, train_step
from sharding.rules import spec

pytestmark = pytest.mark.usefixtures("one_device")

KINDS = {"v3": models.v3(num_nextn_predict_layers=0), "v2": models.v2(), "moe": models.moe()}
T = 16


@jax.jit
def forward(model, batch, bias):
    hidden = model(batch, bias, models.COMPUTE).hidden
    return hidden, model.logits(hidden)


@pytest.mark.parametrize("one_by_one", [False, True], ids=["scan", "one by one"])
@pytest.mark.parametrize("name", KINDS)
def test_new_tokens_on_the_cache_give_the_logits_of_the_full_forward_pass(name, one_by_one, monkeypatch):
    """Parts of 1, 3 and 10 tokens, absorbed and expanded, of rows whose pages lie anywhere; what is behind a row's
    length, and in pages of others, does not matter."""
    monkeypatch.setattr(MLA, "expanding_pays", lambda self: 4)
    model, bias = models.draw(KINDS[name])
    whole = models.pack([[T], [T], [T]], T)
    _, logits = forward(model, whole, bias)
    pages = jax.tree.map(lambda a: a + 7, new_pages(KINDS[name], 20, 4, jnp.float32))
    table = np.random.default_rng(0).permutation(np.arange(1, 20))[:15].reshape(3, 5).astype(np.int32)
    table = jax.device_put(table, spec("batch", None))
    layers = jax.jit(unstack)(model) if one_by_one else None
    step = jax.jit(lambda *a: model.extend(*a, bias, models.COMPUTE, layers))
    got, at = [], np.zeros(3, np.int32)
    for n in (10, 1, 3, 1, 1):
        out = step(whole.tokens[:, at[0] : at[0] + n], pages, table, jax.device_put(at, spec("batch")))
        got, pages, at = [*got, jax.jit(model.logits)(out.hidden)], out.pages, at + n
    np.testing.assert_allclose(np.concatenate(got, axis=1), logits, atol=1e-5)


def test_many_tokens_at_once_are_expanded_where_that_is_cheaper():
    cfg = configs.load("v3").model
    model, _ = abstract(cfg)
    pays = model.moe.attn.expanding_pays()
    more = 2 * cfg.kv_lora_rank - cfg.qk_nope_head_dim - cfg.v_head_dim
    expansion = cfg.kv_lora_rank * (cfg.qk_nope_head_dim + cfg.v_head_dim)
    assert pays * more >= expansion > (pays - 1) * more


@pytest.mark.parametrize("name", KINDS)
def test_packed_documents_are_to_each_other_as_if_alone(name):
    model, bias = models.draw(KINDS[name])
    packed = models.pack([[7, 6], [7], [6]], T)
    tokens = np.array(packed.tokens)
    tokens[1, :7], tokens[2, :6] = tokens[0, :7], tokens[0, 7:13]
    hidden, _ = forward(model, packed.replace(tokens=jnp.asarray(tokens)), bias)
    np.testing.assert_allclose(hidden[0, :7], hidden[1, :7], atol=1e-5)
    np.testing.assert_allclose(hidden[0, 7:13], hidden[2, :6], atol=1e-5)
    assert np.all(np.isfinite(hidden))


@pytest.mark.parametrize("name", ["tiny", "v2_lite", "v3", "moe_16b"])
def test_the_cache_holds_what_was_published_a_token_and_nothing_else(name):
    cfg = configs.load(name).model
    pages = jax.eval_shape(lambda: new_pages(cfg, 2, 4, jnp.bfloat16))
    kept = sum(leaf.size for leaf in jax.tree.leaves(pages)) / 8
    assert kept == count.cache(cfg).own
    if cfg.attention == "mla":
        assert kept == cfg.num_hidden_layers * (cfg.kv_lora_rank + cfg.qk_rope_head_dim)


@pytest.mark.parametrize("name", configs.PRESETS)
def test_models_have_exactly_the_parameters_of_the_closed_form(name):
    cfg = configs.load(name).model
    model, bias = abstract(cfg)
    parts = {key: size(getattr(model, key)) for key in ("dense", "moe", "norm", "embed", "head")}
    biases = [size(part) if cfg.topk_method == "noaux_tc" else 0 for part in (bias.moe, bias.mtp)]
    expected = count.parameters(cfg)
    assert sum(parts.values()) + biases[0] == expected.total
    assert size((model.mtp_input, model.mtp_block)) + biases[1] == expected.mtp


def test_a_61_layer_step_is_as_large_a_program_as_a_6_layer_one():
    def equations(n_layers):
        cfg = configs.load("v3")
        cfg = replace(cfg, model=replace(cfg.model, num_hidden_layers=n_layers))
        state = jax.eval_shape(lambda: init_state(cfg))
        batch = models.micro_batches(models.pack([[8]], 8), 1)
        step = functools.partial(train_step, config=cfg)
        return n_equations(jax.make_jaxpr(step)(state, batch, models.knobs()).jaxpr)

    assert equations(61) == equations(6)


def test_remat_deepseek_saves_less_than_none_and_more_than_full():
    saved = {policy: residuals(policy) for policy in ("none", "deepseek", "full")}
    size = {policy: sum(math.prod(shape) for shape in shapes) for policy, shapes in saved.items()}
    assert size["full"] < size["deepseek"] < size["none"]


def test_remat_deepseek_saves_no_norm_output_and_no_up_projection():
    cfg = REMAT
    head = (cfg.num_moe_layers, 1, T)  # every layer's activations, stacked
    rows = (cfg.num_moe_layers, T * cfg.num_experts_per_tok)  # those of the experts, by token and choice
    saved = sorted(shape for shape in residuals("deepseek") if shape[:3] == head or shape[:2] == rows)
    d, f = cfg.hidden_size, cfg.moe_intermediate_size
    assert saved == sorted(
        [
            (*head, d),  # the layer's input
            (*head, cfg.q_lora_rank),  # latents before their norms
            (*head, cfg.kv_lora_rank + cfg.qk_rope_head_dim),
            (*head, cfg.num_attention_heads, cfg.v_head_dim),  # the attention's output
            (*head, d),  # the residual stream between attention and feed-forward
            (*head, cfg.num_experts_per_tok),  # the choice of experts
            *[(*head, f)] * 2,  # the shared expert's gate and up
            *[(*rows, f)] * 2,  # the routed experts'
        ]
    )
    per_head = sorted((*head, cfg.num_attention_heads, cfg.qk_head_dim))
    assert sum(sorted(shape) == per_head for shape in residuals("none")) >= 2  # queries and keys: not saved above


REMAT = models.v3(num_nextn_predict_layers=0, num_hidden_layers=4, hidden_size=36, moe_intermediate_size=20)


@functools.cache
def residuals(policy: str) -> list[tuple[int, ...]]:
    """Shapes of all that the forward pass keeps for the backward pass."""
    compute = replace(models.COMPUTE, remat=policy)
    model, bias = models.draw(REMAT)
    batch = models.pack([[T]], T)

    def pull(model):
        return jax.vjp(lambda model: model(batch, bias, compute).hidden, model)[1]

    return [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(pull, model))]


def abstract(cfg):
    return jax.eval_shape(lambda: DeepSeek(cfg, rngs=nnx.Rngs(0))), jax.eval_shape(lambda: init_router_bias(cfg))


def size(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def n_equations(jaxpr) -> int:
    """Equations of a program, inner ones included."""
    inner = (j for equation in jaxpr.eqns for j in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr))
    return len(jaxpr.eqns) + sum(n_equations(getattr(j, "jaxpr", j)) for j in inner if is_jaxpr(j))


def is_jaxpr(value) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")
