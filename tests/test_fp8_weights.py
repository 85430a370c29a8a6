"""Weights that are kept in FP8: those of a released checkpoint as they are, and what is generated with them."""

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest

from dsjax import nn
from dsjax.config import Config, ConfigError, EngineConfig, replace
from dsjax.hub import fp8
from dsjax.hub.checkpoint import HubCheckpoint
from dsjax.hub.load import Loaded, load, logits
from dsjax.infer import engine
from dsjax.infer.generate import generate_tokens
from dsjax.precision import RECIPES, cast_weights, in_fp8, is_quantised, quantise_weights, weight_name
from pallas_kernels.quantise import dequantise
from sharding.mesh import make_mesh

sys.path.append(str(Path(__file__).parent / "hub"))
import checkpoints

RECIPE = "fp8_deepseek"
CFG = models.v3(num_hidden_layers=2, max_position_embeddings=64)
TOKENS = np.arange(16).reshape(1, 16) % models.VOCAB


def leaves(model) -> dict:
    paths = jax.tree_util.tree_leaves_with_path(model, is_leaf=is_quantised)
    return {weight_name(path): w for path, w in paths}


@functools.cache
def drawn(width=CFG.hidden_size, **sizes):
    """A model in bfloat16 and FP8 on a mesh, both to be computed in FP8."""
    cfg = replace(CFG, hidden_size=width)
    mesh = make_mesh(jax.devices()[: int(np.prod(list(sizes.values())))], **sizes)
    compute = replace(models.COMPUTE, precision=RECIPE)
    with jax.set_mesh(mesh):
        model, bias = models.draw(cfg)
        model = cast_weights(model, "bf16")
        quantised = jax.jit(quantise_weights, static_argnums=1)(model, RECIPE)
    config = Config(model=cfg, seq_len=64, compute=compute)
    return tuple(Loaded(m, bias, mesh, config, Path()) for m in (model, quantised))


def test_all_matrices_of_the_recipe_are_kept_and_no_other():
    plain, kept = (leaves(it.model) for it in drawn())
    quantised = {name for name, w in kept.items() if is_quantised(w)}
    others = {name for name in kept if name not in quantised}
    assert {name.split("/")[-1] for name in quantised} == {"wq_a", "wq_b", "wkv_a", "wo", "w_gate", "w_up", "w_down"}
    assert {name.split("/")[-1] for name in others} == {"embed", "head", "scale", "wkv_b", "weight", "eh_proj"}
    for name in quantised:
        matrix = kept[name].values.reshape(*kept[name].scales.shape[:-2], -1, plain[name].shape[-1])
        assert kept[name].shape == plain[name].shape and matrix.dtype == jnp.float8_e4m3fn


def test_a_product_with_kept_weights_is_that_which_quantises_them(one_device):
    """Bit for bit: the same values and scales, made once."""
    plain, kept = (it.model for it in drawn())
    scaling = RECIPES[RECIPE].attention
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, CFG.hidden_size)), jnp.bfloat16)
    for name in ("wq_a", "wo"):
        w, q = (getattr(m.moe.attn.query if name == "wq_a" else m.moe.attn, name)[...] for m in (plain, kept))
        layer = x if name == "wq_a" else x[:, :, : CFG.num_attention_heads, None].repeat(CFG.v_head_dim, -1)
        product = jax.jit(nn.linear, static_argnames=("name", "scaling"))
        got = product(layer, q[0], scaling=scaling)
        assert jnp.array_equal(got, product(layer, w[0], scaling=scaling)), name


def test_the_whole_model_is_the_one_that_quantises_at_every_use():
    """Experts, shared experts, dense layers, attention: `dsjax.logits` of both."""
    plain, kept = drawn()
    np.testing.assert_array_equal(logits(kept, TOKENS), logits(plain, TOKENS))


@pytest.mark.slow
def test_the_engine_gives_the_text_of_one_that_quantises_at_every_use(monkeypatch):
    """Bit for bit, and mostly what the whole forward pass, which quantises wkv_b too, holds for likeliest."""
    texts = []
    monkeypatch.setattr(engine, "in_fp8", lambda model: True)
    for it in drawn():
        with jax.set_mesh(it.mesh):
            options = EngineConfig(max_rows=1, page_size=4, prefill_chunk=8)
            (text,) = generate_tokens(it, [TOKENS[0].tolist()], options=options, max_tokens=20, temperature=0.0)
        texts.append(text)
    assert texts[0] == texts[1]
    scores = logits(drawn()[1], [[*TOKENS[0].tolist(), *texts[1]]])[0, TOKENS.size - 1 : -1]
    assert np.mean(scores.argmax(axis=1) == texts[1]) >= 0.6


@pytest.mark.parametrize("sizes", [{"expert": 2}, {"tensor": 2}, {"fsdp": 2, "width": 256}], ids=str)
def test_on_several_devices_too(sizes):
    """Each device's part has tiles of its own, and what is gathered from several has whole ones."""
    plain, kept = drawn(**sizes)
    assert in_fp8(kept.model)
    rows = np.tile(TOKENS, (2, 1))
    np.testing.assert_array_equal(logits(kept, rows), logits(plain, rows))


def test_a_matrix_that_is_gathered_from_parts_of_tiles_is_left_as_it_is():
    assert not in_fp8(drawn(fsdp=2)[1].model)
    assert {name for name, w in leaves(drawn(fsdp=2, width=256)[1].model).items() if is_quantised(w)} == {
        name for name, w in leaves(drawn()[1].model).items() if is_quantised(w) and "wq_b" not in name
    }


@pytest.mark.parametrize("scale", ["F32", "F8_E8M0"])
def test_a_released_checkpoint_keeps_its_values_and_scales(scale, tmp_path):
    cfg = checkpoints.WIDE
    tensors = checkpoints.quantised(checkpoints.draw(cfg), cfg, ue8m0=scale == "F8_E8M0", scale_dtype=scale)
    folder = checkpoints.write(tmp_path, tensors, cfg)
    got = leaves(load(folder, "fp8").model)
    hub, n = HubCheckpoint(folder), 0
    for t in hub.tensors:
        w = got.get(t.leaf.removeprefix("model/"))
        if t.copy or not is_quantised(w):
            continue
        n += 1
        values, scales = (np.asarray(a)[t.index] for a in (w.values, w.scales))
        stored = tensors[t.name].T
        np.testing.assert_array_equal(values.reshape(stored.shape).view(np.uint8), stored.view(np.uint8), t.name)
        np.testing.assert_array_equal(scales, tensors[t.name + fp8.SUFFIX].astype(np.float32).T)
    assert n > 20


def test_a_bfloat16_checkpoint_may_be_loaded_in_fp8_and_an_unknown_format_is_refused(tmp_path):
    folder = checkpoints.write(tmp_path, checkpoints.bfloat16(checkpoints.draw(checkpoints.WIDE)), checkpoints.WIDE)
    plain, kept = load(folder, "bfloat16"), load(folder, "fp8")
    at_every_use = dataclasses.replace(plain, config=kept.config)
    np.testing.assert_array_equal(logits(kept, TOKENS), logits(at_every_use, TOKENS))
    name = "moe/ffn/experts/w_up"
    stood_for, stored = dequantise(jax.device_get(leaves(kept.model)[name])), jax.device_get(leaves(plain.model)[name])
    assert np.abs(stood_for - stored).max() <= 0.04 * np.abs(stood_for).max()
    with pytest.raises(ConfigError, match="dtype=int4: expected float32, bfloat16 or fp8"):
        load(folder, "int4")
