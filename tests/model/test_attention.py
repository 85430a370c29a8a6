"""Attention in blocks against one plain softmax; MLA against the paper's equations; absorbed against expanded."""

import logging
import re

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from dsjax.config import replace
from dsjax.model import attention
from dsjax.model.attention import attend
from dsjax.model.cache import new_pages
from dsjax.model.mla import MLA
from dsjax.model.rope import inv_freq, rope_tables, softmax_scale
from dsjax.state import Places
from pallas_kernels import choice
from sharding.rules import spec

pytestmark = pytest.mark.usefixtures("one_device")

B, T = 2, 9
YARN_AND_COMPRESSED = models.v3(rope_scaling=models.YARN)
KINDS = {"compressed": models.v3(), "plain query": models.v2(rope_scaling=None), "yarn": YARN_AND_COMPRESSED}
WITH_MHA = {**KINDS, "mha": models.moe()}


def attention_of(cfg):
    """The attention of the first layer."""
    return jax.tree.map(lambda a: a[0], models.draw(cfg)[0].dense.attn)


def hidden(cfg, b=B, t=T, seed=0):
    return place(np.random.default_rng(seed).normal(size=(b, t, cfg.hidden_size)), "batch", "seq", None)


def place(a, *names):
    """On the mesh, as the model lays such an array out."""
    return jax.device_put(np.asarray(a, np.int32 if np.asarray(a).dtype.kind == "i" else np.float32), spec(*names))


def one_document(b=B, t=T):
    return place(np.ones((b, t), np.int32), "batch", "seq")


def lengths(*n):
    return place(np.asarray(n, np.int32), "batch")


def empty(cfg, size):
    """Pages of one layer: the first for nobody, then one a row."""
    return new_pages(replace(cfg, num_hidden_layers=1), 1 + B, size, jnp.float32)


@jax.jit
def expanded(attn, x, segment_ids):
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2], out_sharding=spec("batch", "seq"))
    return attn(x, rope_tables(positions, attn.cfg), segment_ids)


@jax.jit
def extend(attn, x, pages, length):
    positions = length[:, None] + jnp.arange(x.shape[1])
    table = jax.device_put(1 + np.arange(B, dtype=np.int32)[:, None], spec("batch", None))
    return attn.extend(x, rope_tables(positions, attn.cfg), pages, Places(table, length, jnp.int32(0)))


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def naive(q, k, v, segment_ids, scale):
    """softmax(q k^T) v over the whole [T, T] matrix, in float64."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    scores = np.einsum("bthk,bshk->bhts", q, k) * scale
    index = np.arange(q.shape[1])
    seen = (index[:, None] >= index) & (segment_ids[:, :, None] == segment_ids[:, None, :])
    return np.einsum("bhts,bshv->bthv", softmax(np.where(seen[:, None], scores, -np.inf)), v)


@pytest.mark.parametrize(
    ("implementation", "t", "chunk"),  # 300: no whole number of blocks; 48: three chunks a block, and some rows more
    [("blocks", 300, 512), ("blocks", 300, 48), ("splash_interpret", 256, 512), ("splash_interpret", 300, 512)],
)
def test_several_blocks_of_queries_equal_one_softmax_forward_and_backward(implementation, t, chunk, monkeypatch):
    monkeypatch.setattr(attention, "_CHUNK", chunk)
    rng = np.random.default_rng(0)
    q, k, v, g = (rng.normal(size=(1, t, 2, w)) for w in (8, 8, 6, 6))
    q, k, v, g = (place(a, "batch", "seq", "heads", None) for a in (q, k, v, g))
    segments = np.asarray([[1] * 140 + [2] * 100 + [0] * (t - 240)])
    segment_ids = place(segments, "batch", "seq")
    y, gradients = jax.jit(
        jax.value_and_grad(
            lambda q, k, v: jnp.sum(g * attend(q, k, v, segment_ids, 0.3, implementation)), argnums=(0, 1, 2)
        )
    )(q, k, v)

    def whole(q, k, v):
        seen = np.tril(np.ones((t, t), bool)) & (segments[:, :, None] == segments[:, None, :])
        scores = jnp.where(seen[:, None], jnp.einsum("bthk,bshk->bhts", q, k) * 0.3, -jnp.inf)
        return jnp.sum(g * jnp.einsum("bhts,bshv->bthv", jax.nn.softmax(scores, axis=-1), v))

    expected = np.sum(np.asarray(g) * naive(q, k, v, segments, 0.3))
    assert float(y) == pytest.approx(expected, rel=1e-5)
    with jax.set_mesh(None):
        plain = [jnp.asarray(np.asarray(a)) for a in (q, k, v)]
        g = np.asarray(g)
        plain_gradients = jax.jit(jax.grad(whole, argnums=(0, 1, 2)))(*plain)
    for got, wanted in zip(gradients, plain_gradients, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_what_cudnn_is_asked_for_is_the_same_attention():
    """By the same call of jax.nn with its other implementation, which runs everywhere."""
    rng, t = np.random.default_rng(0), 40
    q, k, v, g = (jnp.asarray(rng.normal(size=(2, t, 2, w)), jnp.float32) for w in (8, 8, 6, 6))
    segments = np.asarray([[1] * 20 + [2] * 15 + [0] * 5, [1] * t])

    def both(q, k, v):
        y = attention._library(q, k, v, jnp.asarray(segments), 0.3, "xla")
        index = jnp.arange(t)
        places = index, jnp.asarray(segments), jnp.asarray(segments)
        swapped = attention._attend(*(a.swapaxes(1, 2) for a in (q, k, v)), places, 0.3)
        return jnp.stack([jnp.sum(g * y), jnp.sum(g * swapped.swapaxes(1, 2))]), y

    with jax.set_mesh(None):
        (gradients, y) = jax.jit(jax.jacrev(both, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    np.testing.assert_allclose(y, naive(q, k, v, segments, 0.3), atol=1e-5)
    for by_library, by_blocks in gradients:
        np.testing.assert_allclose(by_library, by_blocks, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "t", "calls"),
    [(jnp.bfloat16, 256, 2), (jnp.bfloat16, 200, 0), (jnp.bfloat16, 16384, 0), (jnp.float32, 256, 0)],
)
def test_cudnn_is_called_forward_and_backward_where_it_can(dtype, t, calls, monkeypatch):
    """Lowered for a Hopper GPU that is not there, which JAX asks for its version and age."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 92200)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda capability: capability <= "9.0")
    text = lowered_for_a_gpu(dtype, t)
    assert len(re.findall(r'custom_call @"?__cudnn\$fmha', text)) == calls
    assert ("exponential" in text) == (calls == 0)


def test_without_cudnn_attention_is_in_blocks_and_that_is_said_once(caplog):
    choice.warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        texts = [lowered_for_a_gpu(jnp.bfloat16, t) for t in (256, 128)]
    assert len(caplog.records) == 1 and "attention in blocks, not by cuDNN: " in caplog.text
    assert all("exponential" in text for text in texts)


def lowered_for_a_gpu(dtype, t):
    heads = spec("batch", "seq", "heads", None)
    q, v = (jax.ShapeDtypeStruct((1, t, 2, w), dtype, sharding=heads) for w in (192, 128))
    ids = jax.ShapeDtypeStruct((1, t), jnp.int32, sharding=spec("batch", "seq"))

    def forward_and_back(q, k, v, ids):
        y, pull = jax.vjp(lambda q, k, v: attend(q, k, v, ids, 0.1, "cudnn"), q, k, v)
        return pull(y)

    return jax.jit(forward_and_back).trace(q, q, v, ids).lower(lowering_platforms=("cuda",)).as_text()


def test_32768_tokens_hold_no_scores_of_all_pairs():
    t, heads = 32768, 2
    q = jax.ShapeDtypeStruct((1, t, heads, 24), jnp.bfloat16, sharding=spec("batch", "seq", "heads", None))
    ids = jax.ShapeDtypeStruct((1, t), jnp.int32, sharding=spec("batch", "seq"))

    def forward_and_back(q, k, v, ids):
        y, pull = jax.vjp(lambda q, k, v: attend(q, k, v, ids, 0.2, "blocks"), q, k, v)
        return pull(y)

    memory = jax.jit(forward_and_back).lower(q, q, q, ids).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * heads * t * t / 16  # a sixteenth of one [T, T] in float32; 430 MB


@pytest.mark.parametrize("name", KINDS)
def test_mla_follows_the_papers_equations(name):
    cfg = KINDS[name]
    attn, x = attention_of(cfg), hidden(cfg)
    w = {key: a.astype(np.float64) for key, a in models.named_leaves(attn).items()}
    nope, c = cfg.qk_nope_head_dim, cfg.kv_lora_rank
    frequencies = inv_freq(cfg.qk_rope_head_dim, cfg.rope_theta, cfg.rope_scaling)
    turn = np.exp(1j * np.arange(T)[:, None] * frequencies)

    def norm(a, scale):
        return a / np.sqrt(np.mean(a**2, axis=-1, keepdims=True) + cfg.rms_norm_eps) * scale

    def rope(a):  # [B, T, H, R]
        z = (a[..., 0::2] + 1j * a[..., 1::2]) * turn[:, None]
        return np.stack([z.real, z.imag], axis=-1).reshape(a.shape)

    h = np.asarray(x, np.float64)
    if cfg.q_lora_rank is None:
        q = np.einsum("btd,dhk->bthk", h, w["query/wq"])
    else:
        q = np.einsum("btc,chk->bthk", norm(h @ w["query/wq_a"], w["query/q_norm/scale"]), w["query/wq_b"])
    latent = h @ w["wkv_a"]
    c_kv, k_rope = norm(latent[..., :c], w["kv_norm/scale"]), rope(latent[:, :, None, c:])
    kv = np.einsum("btc,chk->bthk", c_kv, w["wkv_b"])
    q = np.concatenate([q[..., :nope], rope(q[..., nope:])], axis=-1)
    k = np.concatenate([kv[..., :nope], np.broadcast_to(k_rope, (*kv.shape[:3], cfg.qk_rope_head_dim))], axis=-1)
    y = naive(q, k, kv[..., nope:], np.ones((B, T)), softmax_scale(cfg))
    expected = np.einsum("bthv,hvd->btd", y, w["wo"])

    np.testing.assert_allclose(expanded(attn, x, one_document()), expected, atol=1e-5)
    _, pages = extend(attn, x, empty(cfg, T), lengths(0, 0))
    np.testing.assert_allclose(pages.c_kv[0, 1:], c_kv, atol=1e-5)
    np.testing.assert_allclose(pages.k_rope[0, 1:], k_rope[:, :, 0], atol=1e-5)


@pytest.mark.parametrize("at_once", [1, T], ids=["one by one", "all at once"])
@pytest.mark.parametrize("name", WITH_MHA)
def test_tokens_on_a_cache_give_what_the_whole_sequence_gives(name, at_once, monkeypatch):
    """One by one in the absorbed form, all at once with keys and values expanded from the cache."""
    monkeypatch.setattr(MLA, "expanding_pays", lambda self: T)
    cfg = WITH_MHA[name]
    attn, x = attention_of(cfg), hidden(cfg)
    whole, pages = expanded(attn, x, one_document()), empty(cfg, T + 3)
    step = jax.jit(extend.__wrapped__)
    for t in range(0, T, at_once):
        y, pages = step(attn, x[:, t : t + at_once], pages, lengths(t, t))
        np.testing.assert_allclose(y, whole[:, t : t + at_once], atol=1e-5)


def test_new_tokens_see_each_other_and_their_own_rows_past():
    """Four tokens at once, after pasts of different length, equal those tokens one at a time."""
    cfg = KINDS["yarn"]
    attn, past, new = attention_of(cfg), hidden(cfg), hidden(cfg, t=4, seed=1)
    length = lengths(T, 3)
    _, pages = extend(attn, past, empty(cfg, T + 4), lengths(0, 0))
    together, _ = extend(attn, new, pages, length)
    rows = np.array(past)
    rows[1, 3:7] = new[1]
    alone = expanded(attn, place(rows, "batch", "seq", None), one_document())
    np.testing.assert_allclose(together[1], alone[1, 3:7], atol=1e-5)
