"""The cache of past tokens in pages: what a token adds, and what a row has.

Pages belong to no row: `Places` says which hold the tokens of each. One array holds those of all layers, so that a
step, which is one program of many layers, writes in place.
"""

import jax
import jax.numpy as jnp
from jax import P, lax
from jaxtyping import Array, Float, Int

from dsjax.config import ModelConfig
from dsjax.state import KVCache, LatentCache, Places
from pallas_kernels import paged_attention
from sharding.rules import RULES, spec


def new_pages(cfg: ModelConfig, n_pages: int, page_size: int, dtype, n_mtp: int = 0) -> LatentCache | KVCache:
    """Empty pages for the trunk and n_mtp layers of multi-token prediction: leaves [L, n_pages, page_size, ...].

    n_pages is over all shards of the batch; the first page of each shard is for what nobody reads.
    """
    n_layers = cfg.num_hidden_layers + n_mtp
    if cfg.attention == "mla":
        kind, widths = LatentCache, ((cfg.kv_lora_rank,), (cfg.qk_rope_head_dim,))
    else:
        kind, widths = KVCache, ((cfg.num_attention_heads, cfg.v_head_dim),) * 2
    shapes = [(n_layers, n_pages, page_size, *width) for width in widths]
    return kind(*(jnp.zeros(shape, dtype, out_sharding=_layouts(len(shape))[1]) for shape in shapes))


def write(pages: Float[Array, "L P S *F"], new: Float[Array, "B T *F"], places: Places) -> Float[Array, "L P S *F"]:
    """`pages` with a layer's new tokens behind those that each row has. A token that has no page is not kept."""
    row, held = _layouts(pages.ndim)
    in_specs = (held, row, spec("batch", None), spec("batch"), P())
    return jax.shard_map(paged_attention.write, in_specs=in_specs, out_specs=held, check_vma=False)(
        pages, jax.reshard(new, row), places.table, places.length, places.layer
    )


def read(pages: Float[Array, "L P S *F"], places: Places) -> Float[Array, "B N_S *F"]:
    """What a layer's pages hold of each row, in order; behind its length, anything finite."""

    row, held = _layouts(pages.ndim)
    return jax.shard_map(
        paged_attention.gather, in_specs=(held, spec("batch", None), P()), out_specs=row, check_vma=False
    )(pages, places.table, places.layer)


def fetch(pages: LatentCache | KVCache, ids: Int[Array, "N"], shard: Int[Array, ""]) -> LatentCache | KVCache:
    """All layers' [L, N, page_size, ...] of pages of one shard, on every device."""

    def local(pages, ids, shard):
        got = jnp.where(lax.axis_index(RULES["batch"]) == shard, pages[:, ids], 0)
        return lax.psum(got, RULES["batch"])

    def of_leaf(p):
        held = _layouts(p.ndim)[1]
        out = P(None, None, *held[2:])
        return jax.shard_map(local, in_specs=(held, P(), P()), out_specs=out, check_vma=False)(p, ids, shard)

    return jax.tree.map(of_leaf, pages)


def put(
    pages: LatentCache | KVCache, ids: Int[Array, "N"], shard: Int[Array, ""], kept: LatentCache | KVCache
) -> LatentCache | KVCache:
    """The pages with what was fetched in these of one shard."""

    def local(pages, ids, shard, kept):
        return pages.at[:, jnp.where(lax.axis_index(RULES["batch"]) == shard, ids, 0)].set(kept)

    def of_leaf(p, kept):
        held = _layouts(p.ndim)[1]
        layout = P(None, None, *held[2:])
        return jax.shard_map(local, in_specs=(held, P(), P(), layout), out_specs=held, check_vma=False)(
            p, ids, shard, jax.reshard(kept, layout)
        )

    return jax.tree.map(of_leaf, pages, kept)


def _layouts(ndim: int) -> tuple[P, P]:
    """Of rows [B, S, ...] and of pages [L, P, S, ...]; plain attention's have heads."""
    inner = ("heads", None) if ndim == 5 else (None,)
    return spec("batch", None, *inner), spec(None, "batch", None, *inner)
