"""Attention on a latent cache: the definition against NumPy, the TPU kernel against both, in blocks so small that rows
end in all of them."""

import functools

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

import configs
from dsjax.config import replace
from dsjax.model.cache import new_pages
from pallas_kernels import latent_attention as module
from pallas_kernels.latent_attention import choose_block, latent_attention, pallas_tpu
from sharding.mesh import make_mesh
from sharding.rules import spec

B, H, C, R, S = 3, 2, 24, 8, 40
BLOCK, SCALE = 16, 0.3  # the last block is half outside the cache
TOLERANCE = {jnp.float32: 1e-6, jnp.bfloat16: 2**-7}


def operands(t, dtype=jnp.float32, seed=0):
    """q_latent, q_rope, c_kv, k_rope."""
    rng = np.random.default_rng(seed)
    return tuple(
        jnp.asarray(rng.standard_normal(shape), dtype) for shape in [(B, t, H, C), (B, t, H, R), (B, S, C), (B, S, R)]
    )


def numpy(q_latent, q_rope, c_kv, k_rope, lengths):
    """The equations, token by token and head by head, in float64."""
    q_latent, q_rope, c_kv, k_rope = (np.asarray(a, np.float64) for a in (q_latent, q_rope, c_kv, k_rope))
    out = np.empty_like(q_latent)
    for b, t, h in np.ndindex(out.shape[:3]):
        seen = slice(0, lengths[b] + t + 1)
        scores = SCALE * (c_kv[b, seen] @ q_latent[b, t, h] + k_rope[b, seen] @ q_rope[b, t, h])
        p = np.exp(scores - scores.max())
        out[b, t, h] = p / p.sum() @ c_kv[b, seen]
    return out


@functools.partial(jax.jit, static_argnames=("implementation", "interpret"))
def run(*args, implementation="kernel", interpret=True):
    if implementation == "kernel":
        return pallas_tpu(*args, SCALE, block=BLOCK, interpret=interpret)
    return latent_attention(*args, SCALE, implementation)


def assert_same(actual, expected, dtype=jnp.float32):
    assert actual.dtype == dtype
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=4 * TOLERANCE[dtype])


@settings(max_examples=40, deadline=None)
@given(st.data())
@pytest.mark.parametrize("t", [1, 3])
@pytest.mark.parametrize("implementation", ["kernel", "reference"])
def test_any_lengths_give_what_the_equations_give(implementation, t, data):
    lengths = data.draw(st.lists(st.integers(0, S - t), min_size=B, max_size=B))
    args = operands(t)
    assert_same(run(*args, jnp.array(lengths), implementation=implementation), numpy(*args, lengths))


@pytest.mark.parametrize("t", [1, 3])
@pytest.mark.parametrize("implementation", ["kernel", "pallas_interpret", "reference"])
def test_bf16_sums_in_float32(implementation, t):
    args, lengths = operands(t, jnp.bfloat16), [0, 21, S - t]
    actual = run(*args, jnp.array(lengths), implementation=implementation)
    assert_same(actual, numpy(*args, lengths), jnp.bfloat16)


@pytest.mark.parametrize("t", [1, 3])
@pytest.mark.parametrize("lengths", [[0, 14, 15], [16, 29, S - 3]])  # before, on and after the ends of blocks
def test_what_is_not_written_may_be_nan(lengths, t):
    args = operands(t)
    written = (np.arange(S) < np.array(lengths)[:, None] + t)[..., None]
    nan = (*args[:2], *(jnp.where(written, a, jnp.nan) for a in args[2:]))
    assert_same(run(*nan, jnp.array(lengths)), numpy(*args, lengths))


def test_large_scores_do_not_overflow():
    q_latent, *others = operands(1)
    args, lengths = (1e4 * q_latent, *others), [5, 21, S - 1]
    assert_same(run(*args, jnp.array(lengths)), numpy(*args, lengths))


def test_no_races_on_two_cores(capfd):
    args, lengths = operands(3), [0, 14, S - 3]
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2)
    assert_same(run(*args, jnp.array(lengths), interpret=interpret), numpy(*args, lengths))
    assert "RACE DETECTED" not in capfd.readouterr().out  # the detector only prints


@pytest.mark.parametrize("preset", ["tiny", "v2_lite", "v2", "v3"])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("t", [1, 4])
def test_blocks_of_every_preset_fit_the_chip(preset, itemsize, t):
    cfg = configs.load(preset).model
    rows, c, r = t * cfg.num_attention_heads, cfg.kv_lora_rank, cfg.qk_rope_head_dim
    for s in (32, 1000, 8192):
        block = choose_block(rows, s, c, r, itemsize)
        assert block == s if s < 1024 else block % 128 == 0
        held = 2 * itemsize * (block * (c + r) + rows * (2 * c + r)) + 4 * rows * (c + block)
        assert held < 0.75 * module.VMEM_BYTES


def test_queries_too_many_for_the_chip_are_refused():
    with pytest.raises(ValueError, match=r"100000 queries of width 512 \+ 64 do not fit 64 MiB of VMEM"):
        choose_block(100_000, 8192, 512, 64, 2)


def test_unknown_implementation_is_an_error():
    with pytest.raises(ValueError, match="implementation='mosaic': choose one of"):
        latent_attention(*operands(1), jnp.zeros(B, jnp.int32), SCALE, "mosaic")


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"fsdp": 1}, id="one device"),
        pytest.param({"fsdp": 2, "expert": 2, "tensor": 2}, id="eight", marks=pytest.mark.slow),
    ],
)
def test_a_model_decodes_with_the_kernel_as_with_the_definition(sizes, monkeypatch):
    """Three tokens at once and then one, after prompts of different length."""
    monkeypatch.setitem(module.IMPLEMENTATION_BY_PLATFORM, "cpu", "pallas_interpret")
    monkeypatch.setattr(module, "_MAX_BLOCK", 16)
    monkeypatch.setattr(module, "LANES", 16)
    cfg = models.v3(num_nextn_predict_layers=0)
    with jax.set_mesh(make_mesh(jax.devices()[: np.prod(list(sizes.values()))], **sizes)):
        model, bias = models.draw(cfg)
        prompt = models.pack([[16]] * 4)
        length = jax.device_put(np.array([9, 5, 1, 16], np.int32), spec("batch"))
        row = np.arange(4) if tuple(sizes) == ("fsdp",) else np.zeros(4)  # of a device: each of four has six pages
        table = (1 + 5 * row[:, None] + np.arange(5)).astype(np.int32)
        table = jax.device_put(table, spec("batch", None))
        tokens = jax.device_put(np.arange(16, dtype=np.int32).reshape(4, 4), spec("batch", "seq"))

        def decode(implementation):
            compute = replace(models.COMPUTE, latent_attention=implementation)

            @jax.jit
            def logits(model, prompt, tokens, bias):
                pages = new_pages(cfg, 24, 8, jnp.float32)
                out = model.extend(prompt.tokens, pages, table, length * 0, bias, compute)
                first = model.extend(tokens[:, :3], out.pages, table, length, bias, compute)
                second = model.extend(tokens[:, 3:], first.pages, table, length + 3, bias, compute)
                return model.logits(first.hidden), model.logits(second.hidden), second.pages

            return jax.tree.leaves(logits(model, prompt, tokens, bias))

        for actual, expected in zip(decode("auto"), decode("reference"), strict=True):
            assert np.all(np.isfinite(actual))
            np.testing.assert_allclose(actual, expected, atol=2e-5)
