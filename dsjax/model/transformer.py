"""The network: embedding, dense blocks, MoE blocks, final norm, head, and multi-token prediction on top."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsjax.config import BalanceConfig, ComputeConfig, ModelConfig, replace
from dsjax.model.balance import balance_losses, expert_load
from dsjax.model.mla import MHA, MLA, Absorbed, Rope
from dsjax.model.moe import MoE
from dsjax.model.mtp import MTPInput, hide, look_ahead
from dsjax.model.rope import rope_tables
from dsjax.nn import RMSNorm, SwiGLU, param, stack
from dsjax.precision import recipe_of
from dsjax.state import Batch, Cache, KVCache, LatentCache, RouterBias
from sharding.rules import constrain, halves, join, spec

# What remat=deepseek keeps for the backward pass; norms, up-projections and SwiGLU outputs are computed again.
_SAVED = ("attn_latent", "attn_out", "attn_residual", "routing", "dispatched", "mlp_gate", "mlp_up")


class Outputs(NamedTuple):
    """What a forward pass gives. Losses are sums over rows, by name, over all layers."""

    hidden: jax.Array  # [B, T, D] after the final norm
    mtp_hidden: tuple[jax.Array, ...]  # each depth's [B, T, D] after its own norm
    load: RouterBias  # tokens routed to each expert, [layers, E] each
    balance: dict[str, jax.Array]
    overflow: jax.Array  # [] int32, rows and pairs that did not fit the experts' buffers, of all layers


class Layers(NamedTuple):
    """The blocks one by one, not stacked: decoding on a CPU reads these in place, where a scan would copy each.

    Of every block the weights and what `MLA.absorbed` makes of them (None for plain attention).
    """

    dense: list[tuple["Block", Absorbed | None]]
    moe: list[tuple["Block", Absorbed | None]]


class Layer(NamedTuple):
    """What an MoE layer says of its routing."""

    load: jax.Array  # [E]
    balance: dict[str, jax.Array]
    overflow: jax.Array  # []


class Block(nnx.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, cfg: ModelConfig, kind: str, *, rngs: nnx.Rngs):
        self.attn_norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps, rngs=rngs)
        self.attn = (MLA if cfg.attention == "mla" else MHA)(cfg, rngs=rngs)
        self.ffn_norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps, rngs=rngs)
        if kind == "moe":
            self.ffn = MoE(cfg, rngs=rngs)
        else:
            self.ffn = SwiGLU(cfg.hidden_size, cfg.intermediate_size, cfg.initializer_range, rngs=rngs)
        self.kind, self.cfg = kind, cfg

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rope: Rope,
        segment_ids: Int[Array, "B T"],
        bias: Float[Array, "E"] | None,
        balance: BalanceConfig,
        compute: ComputeConfig,
    ) -> tuple[Float[Array, "B T D"], LatentCache | KVCache, Layer | None]:
        """x after the block, what decoding will need of its tokens, and an MoE block's load."""
        y, past = self.attn(self.attn_norm(x), rope, segment_ids, compute)
        x, layer = self._feed_forward(checkpoint_name(x + y, "attn_residual"), segment_ids, bias, balance, compute)
        return x, past, layer

    def decode(self, x, rope, cache, length, bias, compute, absorbed):
        """The same for new tokens on a cache: x after the block, and the longer cache."""
        y, cache = self.attn.decode(self.attn_norm(x), rope, cache, length, absorbed, compute)
        x = x + y
        if self.kind == "dense":
            return x + self.ffn(self.ffn_norm(x)), cache
        return x + self.ffn.decode(self.ffn_norm(x), bias, compute), cache

    def _feed_forward(self, x, segment_ids, bias, balance, compute):
        if self.kind == "dense":
            return x + self.ffn(self.ffn_norm(x), recipe_of(compute).mlp), None
        y, routing, overflow = self.ffn(self.ffn_norm(x), bias, compute)
        valid = segment_ids > 0
        return x + y, Layer(expert_load(routing, valid), balance_losses(routing, valid, self.cfg, balance), overflow)


class DeepSeek(nnx.Module):
    """A DeepSeek model: V1, V2 and V3 by configuration. A value: nothing changes after `__init__`."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        v, d, std = cfg.vocab_size, cfg.hidden_size, cfg.initializer_range
        self.embed = param(rngs, (v, d), ("vocab", "embed"), std)
        self.dense = stack(lambda r: Block(cfg, "dense", rngs=r), cfg.first_k_dense_replace, rngs)
        self.moe = stack(lambda r: Block(cfg, "moe", rngs=r), cfg.num_moe_layers, rngs)
        self.norm = RMSNorm(d, cfg.rms_norm_eps, rngs=rngs)
        self.head = param(rngs, (d, v), ("embed", "vocab"), std)
        self.mtp_input = stack(lambda r: MTPInput(cfg, rngs=r), cfg.num_nextn_predict_layers, rngs)
        self.mtp_block = stack(lambda r: Block(cfg, "moe", rngs=r), cfg.num_nextn_predict_layers, rngs)
        self.cfg = cfg

    def __call__(
        self,
        batch: Batch,
        router_bias: RouterBias,
        compute: ComputeConfig = ComputeConfig(),
        balance: BalanceConfig = BalanceConfig(),
    ) -> Outputs:
        """Hidden states of every position; `logits` of them are the predictions of the next tokens."""
        rope = rope_tables(batch.positions, self.cfg)

        def block(x, layer, bias, segment_ids):
            def whole(x, rope, segment_ids):
                x, _, said = layer(x, rope, segment_ids, bias, balance, compute)
                return x, said

            if compute.overlap == "none":
                return whole(x, rope, segment_ids)
            # Neither half waits for the other: what one sends may travel while the other computes.
            (x, said), (y, also) = (whole(*half) for half in halves((x, rope, segment_ids)))
            return join(x, y), jax.tree.map(jnp.add, said, also)

        block = remat(block, compute.remat)
        x = self._embed(batch.tokens, compute)
        x, _ = _scan(lambda x, layer: block(x, layer, None, batch.segment_ids), x, self.dense, compute.scan_layers)
        layers = (self.moe, router_bias.moe)
        x, said = _scan(lambda x, xs: block(x, *xs, batch.segment_ids), x, layers, compute.scan_layers)
        hidden = self.norm(x)

        depths, mtp_hidden, recycled = [], [], hidden if self.cfg.mtp_hidden == "post_norm" else x
        for k in range(self.cfg.num_nextn_predict_layers):
            read, mtp_block = _layer(self.mtp_input, k), _layer(self.mtp_block, k)
            tokens, segment_ids = look_ahead(batch, k + 1)
            embedding = hide(self._embed(tokens, compute), segment_ids)
            x = read(embedding, recycled, recipe_of(compute).eh_proj)
            # Positions stay those of the trunk; a place whose token lies in another document takes no part.
            x, depth = block(x, mtp_block, router_bias.mtp[k], segment_ids)
            mtp_hidden.append(read.out_norm(x))
            recycled = mtp_hidden[-1] if self.cfg.mtp_hidden == "post_norm" else x
            depths.append(depth)
        mtp_said = _stack_leaves(depths) if depths else jax.tree.map(lambda a: a[:0], said)

        losses = jax.tree.map(lambda a, b: jnp.sum(a) + jnp.sum(b), said.balance, mtp_said.balance)
        overflow = jnp.sum(said.overflow) + jnp.sum(mtp_said.overflow)
        return Outputs(hidden, tuple(mtp_hidden), RouterBias(said.load, mtp_said.load), losses, overflow)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Scores of the vocabulary, float32."""
        out = jnp.einsum("btd,dv->btv", hidden, self.head, preferred_element_type=jnp.float32)
        return constrain(out, "batch", "seq", "vocab")

    def prefill(
        self, batch: Batch, router_bias: RouterBias, cache_size: int, compute: ComputeConfig = ComputeConfig()
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Logits after each row's last token, and a cache of `cache_size` places that holds the rows.

        Rows are padded on the right with segment 0. Expanded form.
        """
        rope = rope_tables(batch.positions, self.cfg)
        exact = replace(compute, expert_buffer=None)

        def block(x, layer, bias):
            x, past, _ = layer(x, rope, batch.segment_ids, bias, BalanceConfig(), exact)
            return x, past

        x = self._embed(batch.tokens, compute)
        x, dense = _scan(lambda x, layer: block(x, layer, None), x, self.dense, compute.scan_layers)
        x, moe = _scan(lambda x, xs: block(x, *xs), x, (self.moe, router_bias.moe), compute.scan_layers)
        length = jnp.sum(batch.segment_ids > 0, axis=1, dtype=jnp.int32)
        at_last = jnp.arange(x.shape[1]) == length[:, None] - 1
        last = jnp.einsum("bt,btd->bd", at_last.astype(x.dtype), x)[:, None]
        more = cache_size - batch.tokens.shape[1]

        def grow(a):  # [L, B, T, ...] to [L, B, S, ...]
            return jnp.pad(a, ((0, 0), (0, 0), (0, more), *((0, 0),) * (a.ndim - 3)))

        return self.logits(self.norm(last))[:, 0], Cache(*jax.tree.map(grow, (dense, moe)), length)

    def decode(
        self,
        tokens: Int[Array, "B T"],
        cache: Cache,
        router_bias: RouterBias,
        compute: ComputeConfig = ComputeConfig(),
        layers: Layers | None = None,
    ) -> tuple[Float[Array, "B T V"], Cache]:
        """Logits of new tokens given the cache, and the longer cache. Absorbed form.

        With `layers` (of `unstack`) those blocks are run one after the other, on an unstacked cache.
        """
        positions = cache.length[:, None] + jnp.arange(tokens.shape[1])
        rope = rope_tables(positions, self.cfg)

        def block(x, layer, past, bias):
            layer, absorbed = layer
            return layer.decode(x, rope, past, cache.length, bias, compute, absorbed)

        x = self._embed(tokens, compute)
        dense, moe = layers or ((self.dense, None), (self.moe, None))
        x, dense = _scan(lambda x, xs: block(x, *xs, None), x, (dense, cache.dense), compute.scan_layers)
        x, moe = _scan(lambda x, xs: block(x, *xs), x, (moe, cache.moe, router_bias.moe), compute.scan_layers)
        return self.logits(self.norm(x)), Cache(dense, moe, cache.length + tokens.shape[1])

    def _embed(self, tokens, compute: ComputeConfig):
        table = constrain(self.embed[...], "vocab", None)
        x = table.at[tokens].get(out_sharding=spec("batch", "seq", None))
        return x.astype(recipe_of(compute).dtype)


def init_router_bias(cfg: ModelConfig) -> RouterBias:
    """Bias 0 for every expert of every MoE layer."""
    shapes = cfg.num_moe_layers, cfg.num_nextn_predict_layers
    return RouterBias(*(jnp.zeros((n, cfg.n_routed_experts), jnp.float32) for n in shapes))


def remat(block, policy: str):
    """`block`, keeping for the backward pass what the policy of that name keeps."""
    if policy == "none":
        return block
    saved = {"full": jax.checkpoint_policies.nothing_saveable}.get(
        policy, jax.checkpoint_policies.save_only_these_names(*_SAVED)
    )
    return jax.checkpoint(block, policy=saved)


def _scan(step, x, layers, scan_layers: bool):
    """jax.lax.scan, or the same unrolled; over lists of layers, one after the other, to lists."""
    if isinstance(layers, tuple) and isinstance(layers[0], list):
        said = []
        for layer in zip(*layers):
            x, s = step(x, layer)
            said.append(s)
        return x, said
    if scan_layers:
        return jax.lax.scan(step, x, layers)
    n = jax.tree.leaves(layers)[0].shape[0]
    said = []
    for i in range(n):
        x, s = step(x, _layer(layers, i))
        said.append(s)
    return x, _stack_leaves(said)


def _layer(layers, i: int):
    return jax.tree.map(lambda a: a[i], layers)


def unstack(model: DeepSeek, cache: Cache) -> tuple[Layers, Cache]:
    """What decoding on a CPU reads: the blocks, with their weights absorbed, and their caches one by one."""

    def split(tree) -> list:
        return [_layer(tree, i) for i in range(jax.tree.leaves(tree)[0].shape[0])]

    def ready(stacked) -> list:
        return [(block, block.attn.absorbed()) for block in split(stacked)]

    return Layers(ready(model.dense), ready(model.moe)), Cache(split(cache.dense), split(cache.moe), cache.length)


def _stack_leaves(trees: list):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
