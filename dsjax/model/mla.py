"""Multi-head latent attention, expanded and absorbed, and plain multi-head attention (reference section 2)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsjax.config import ComputeConfig, ModelConfig
from dsjax.model import cache
from dsjax.model.attention import attend, attend_latent, attend_past
from dsjax.model.rope import apply_rope, softmax_scale
from dsjax.nn import RMSNorm, linear, param
from dsjax.precision import recipe_of
from dsjax.state import KVCache, LatentCache, Places
from pallas_kernels.latent_attention import masked_softmax
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.scaled_linear import Scaling
from sharding.rules import constrain, spec

_LATENT_EPS = 1e-6  # whatever rms_norm_eps is: so in the released code and transformers; Moonlight's is 1e-5
Rope = tuple[Float[Array, "B T R"], Float[Array, "B T R"]]  # cos, sin


class Query(nnx.Module):
    """Queries straight from the hidden state (V2-Lite, Moonlight)."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        shape = (cfg.hidden_size, cfg.num_attention_heads, cfg.qk_head_dim)
        self.wq = param(rngs, shape, ("embed", "heads", None), cfg.initializer_range)

    def __call__(self, x: Float[Array, "B T D"], scaling: Scaling | None = None) -> Float[Array, "B T H K"]:
        return linear(x, self.wq[...], "heads", scaling)


class CompressedQuery(nnx.Module):
    """Queries through a normed latent of width q_lora_rank (V2, V3)."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        d, c, std = cfg.hidden_size, cfg.q_lora_rank, cfg.initializer_range
        self.wq_a = param(rngs, (d, c), ("embed", "latent"), std)
        self.q_norm = RMSNorm(c, _LATENT_EPS, rngs=rngs)
        self.wq_b = param(rngs, (c, cfg.num_attention_heads, cfg.qk_head_dim), ("rank", "heads", None), std)

    def __call__(self, x: Float[Array, "B T D"], scaling: Scaling | None = None) -> Float[Array, "B T H K"]:
        latent = checkpoint_name(linear(x, self.wq_a[...], scaling=scaling), "attn_latent")
        return linear(self.q_norm(latent), self.wq_b[...], "heads", scaling)


class Absorbed(NamedTuple):
    """wkv_b as the absorbed form reads it: its two halves, heads first."""

    w_uk: jax.Array  # [H, qk_nope_head_dim, kv_lora_rank], into the query
    w_uv: jax.Array  # [H, kv_lora_rank, v_head_dim], into the output


class MLA(nnx.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1)."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        d, h, c, std = cfg.hidden_size, cfg.num_attention_heads, cfg.kv_lora_rank, cfg.initializer_range
        self.query = Query(cfg, rngs=rngs) if cfg.q_lora_rank is None else CompressedQuery(cfg, rngs=rngs)
        self.wkv_a = param(rngs, (d, c + cfg.qk_rope_head_dim), ("embed", "latent"), std)
        self.kv_norm = RMSNorm(c, _LATENT_EPS, rngs=rngs)
        self.wkv_b = param(rngs, (c, h, cfg.qk_nope_head_dim + cfg.v_head_dim), ("rank", "heads", None), std)
        self.wo = param(rngs, (h, cfg.v_head_dim, d), ("heads", None, "embed"), std)
        self.cfg = cfg

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rope: Rope,
        segment_ids: Int[Array, "B T"],
        compute: ComputeConfig = ComputeConfig(),
    ) -> Float[Array, "B T D"]:
        """Expanded form, of whole sequences."""
        recipe = recipe_of(compute)
        q = jnp.concatenate(self._queries(x, rope, recipe.attention), axis=-1)
        latent = self._latent(x, rope, recipe.attention)
        how = softmax_scale(self.cfg), compute.attention, recipe.attention
        y = attend_latent(q, latent.c_kv, latent.k_rope, self.wkv_b[...], segment_ids, *how)
        return linear(y, self.wo[...], scaling=recipe.attention_out)

    def absorbed(self) -> Absorbed:
        """wkv_b prepared for `extend`."""
        wkv_b = constrain(self.wkv_b[...], None, "heads", None)
        w_uk, w_uv = jnp.split(wkv_b, [self.cfg.qk_nope_head_dim], axis=-1)
        return Absorbed(jnp.transpose(w_uk, (1, 2, 0)), jnp.transpose(w_uv, (1, 0, 2)))

    def extend(
        self,
        x: Float[Array, "B T D"],
        rope: Rope,
        pages: LatentCache,
        places: Places,
        absorbed: Absorbed | None = None,
        compute: ComputeConfig = ComputeConfig(),
    ) -> tuple[Float[Array, "B T D"], LatentCache]:
        """New tokens on the cache: the output, and the pages with them.

        Absorbed (reference section 2.3): wkv_b goes to the query and to the output. Many tokens at once are cheaper
        with keys and values expanded from the row's latents.
        """
        recipe = recipe_of(compute)
        pages = self.remember(x, rope, pages, places, compute)
        q_nope, q_rope = self._queries(x, rope, recipe.attention)
        scale = softmax_scale(self.cfg)
        if x.shape[1] >= self.expanding_pays():
            past = jax.tree.map(lambda p: cache.read(p, places), pages)
            q = jnp.concatenate([q_nope, q_rope], axis=-1)
            y = attend_past(q, past.c_kv, past.k_rope, self.wkv_b[...], places.length, scale)
            return linear(y, self.wo[...], scaling=recipe.attention_out), pages
        w_uk, w_uv = absorbed or self.absorbed()
        q_latent = jnp.einsum("bthk,hkc->bthc", q_nope, w_uk)
        o_latent = _attend_to_cache(q_latent, q_rope, pages, places, scale, compute.latent_attention)
        y = jnp.einsum("bthc,hcv->bthv", o_latent, w_uv)
        return linear(y, self.wo[...], scaling=recipe.attention_out), pages

    def remember(
        self,
        x: Float[Array, "B T D"],
        rope: Rope,
        pages: LatentCache,
        places: Places,
        compute: ComputeConfig = ComputeConfig(),
    ) -> LatentCache:
        """The pages with what the cache keeps of new tokens."""
        latent = self._latent(x, rope, recipe_of(compute).attention)
        return jax.tree.map(lambda p, new: cache.write(p, new, places), pages, latent)

    def expanding_pays(self) -> int:
        """Tokens at once from which the expanded form takes fewer products: C (N + V) an entry against what the
        absorbed form takes more for each token."""
        cfg = self.cfg
        more = 2 * cfg.kv_lora_rank - cfg.qk_nope_head_dim - cfg.v_head_dim
        return max(2, -(-cfg.kv_lora_rank * (cfg.qk_nope_head_dim + cfg.v_head_dim) // max(more, 1)))

    def _queries(self, x, rope, scaling=None):
        q_nope, q_rope = jnp.split(self.query(x, scaling), [self.cfg.qk_nope_head_dim], axis=-1)
        return q_nope, apply_rope(q_rope, *rope)

    def _latent(self, x, rope, scaling=None) -> LatentCache:
        latent = checkpoint_name(linear(x, self.wkv_a[...], scaling=scaling), "attn_latent")
        c_kv, k_rope = jnp.split(latent, [self.cfg.kv_lora_rank], axis=-1)
        return LatentCache(self.kv_norm(c_kv), apply_rope(k_rope, *rope))


class MHA(nnx.Module):
    """Plain multi-head attention with RoPE on the whole head (DeepSeekMoE-16B)."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        d, h, k, std = cfg.hidden_size, cfg.num_attention_heads, cfg.v_head_dim, cfg.initializer_range
        self.wq = param(rngs, (d, h, k), ("embed", "heads", None), std)
        self.wk = param(rngs, (d, h, k), ("embed", "heads", None), std)
        self.wv = param(rngs, (d, h, k), ("embed", "heads", None), std)
        self.wo = param(rngs, (h, k, d), ("heads", None, "embed"), std)
        self.cfg = cfg

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rope: Rope,
        segment_ids: Int[Array, "B T"],
        compute: ComputeConfig = ComputeConfig(),
    ) -> Float[Array, "B T D"]:
        recipe = recipe_of(compute)
        q, k, v = (linear(x, w[...], "heads", recipe.attention) for w in (self.wq, self.wk, self.wv))
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        y = attend(q, k, v, segment_ids, softmax_scale(self.cfg), compute.attention)
        return linear(y, self.wo[...], scaling=recipe.attention_out)

    def absorbed(self) -> None:
        """Nothing: `extend` reads the weights as they are."""

    def extend(
        self,
        x: Float[Array, "B T D"],
        rope: Rope,
        pages: KVCache,
        places: Places,
        absorbed: None = None,
        compute: ComputeConfig = ComputeConfig(),
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """New tokens on cached keys and values: the output, and the pages with them."""
        recipe = recipe_of(compute)
        pages = self.remember(x, rope, pages, places, compute)
        q = apply_rope(linear(x, self.wq[...], "heads", recipe.attention), *rope)
        past = jax.tree.map(lambda p: cache.read(p, places), pages)
        scores = jnp.einsum("bthk,bshk->bhts", q, past.k, preferred_element_type=jnp.float32)
        p = masked_softmax(scores * softmax_scale(self.cfg), places.length)
        y = jnp.einsum("bhts,bshk->bthk", p.astype(x.dtype), past.v)
        return linear(y, self.wo[...], scaling=recipe.attention_out), pages

    def remember(
        self,
        x: Float[Array, "B T D"],
        rope: Rope,
        pages: KVCache,
        places: Places,
        compute: ComputeConfig = ComputeConfig(),
    ) -> KVCache:
        """The pages with the keys and values of new tokens."""
        k, v = (linear(x, w[...], "heads", recipe_of(compute).attention) for w in (self.wk, self.wv))
        new = KVCache(apply_rope(k, *rope), v)
        return jax.tree.map(lambda p, new: cache.write(p, new, places), pages, new)


def _attend_to_cache(
    q_latent: Float[Array, "B T H C"],
    q_rope: Float[Array, "B T H R"],
    pages: LatentCache,
    places: Places,
    scale: float,
    implementation: str,
) -> Float[Array, "B T H C"]:
    """`paged_attention` on each device, of its own rows, pages and heads, for all new tokens of a row."""

    def local(*arrays):
        return paged_attention(*arrays, scale, implementation)

    heads, held = spec("batch", None, "heads", None), spec(None, "batch", None, None)
    in_specs = heads, heads, held, held, spec("batch", None), spec("batch"), P()
    y = jax.shard_map(local, in_specs=in_specs, out_specs=heads, check_vma=False)(
        jax.reshard(q_latent, heads), jax.reshard(q_rope, heads), pages.c_kv, pages.k_rope,
        places.table, places.length, places.layer,
    )  # fmt: skip
    return constrain(y, "batch", "seq", "heads", None)
