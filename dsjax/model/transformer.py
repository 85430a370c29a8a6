"""The network: embedding, dense blocks, MoE blocks, final norm, head, and multi-token prediction on top."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsjax.config import BalanceConfig, ComputeConfig, ModelConfig
from dsjax.model.balance import balance_losses, expert_load
from dsjax.model.mla import MHA, MLA, Absorbed, Rope
from dsjax.model.moe import MoE
from dsjax.model.mtp import MTPInput, hide, look_ahead
from dsjax.model.rope import rope_tables
from dsjax.nn import RMSNorm, SwiGLU, few, linear, param, stack
from dsjax.precision import recipe_of
from dsjax.state import Batch, KVCache, LatentCache, Places, Replicas, RouterBias, Routing
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
    mtp: list[tuple["Block", Absorbed | None]]


class Extended(NamedTuple):
    """What new tokens on a cache give."""

    hidden: jax.Array  # [B, T, D] after the final norm: `logits` of it predict what follows
    before_norm: jax.Array | None  # [B, T, D], where multi-token prediction reads that
    pages: LatentCache | KVCache
    indices: jax.Array  # [expert layers, B, T, K] int32, the experts of each token

    @property
    def recycled(self) -> jax.Array:
        """What a multi-token prediction module reads."""
        return self.hidden if self.before_norm is None else self.before_norm


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
        replay: Int[Array, "B T K"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Layer | None]:
        """x after the block, and an MoE block's load."""
        y = self.attn(self.attn_norm(x), rope, segment_ids, compute)
        x = checkpoint_name(x + y, "attn_residual")
        if self.kind == "dense":
            return x + self.ffn(self.ffn_norm(x), recipe_of(compute).mlp), None
        y, routing, overflow = self.ffn(self.ffn_norm(x), bias, compute, replay)
        valid = segment_ids > 0
        return x + y, Layer(expert_load(routing, valid), balance_losses(routing, valid, self.cfg, balance), overflow)

    def extend(
        self,
        x: Float[Array, "B T D"],
        rope: Rope,
        pages: LatentCache | KVCache,
        places: Places,
        bias: Float[Array, "E"] | None,
        compute: ComputeConfig,
        absorbed: Absorbed | None,
        replicas: Replicas | None = None,
    ) -> tuple[Float[Array, "B T D"], LatentCache | KVCache, Routing | None]:
        """The same for new tokens on a cache: x after the block, the pages with them, and an MoE block's routing."""
        y, pages = self.attn.extend(self.attn_norm(x), rope, pages, places, absorbed, compute)
        x = x + y
        if self.kind == "dense":
            return x + self.ffn(self.ffn_norm(x), recipe_of(compute).mlp), pages, None
        y, routing = self.ffn.decode(self.ffn_norm(x), bias, compute, replicas)
        return x + y, pages, routing


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
        replay: Int[Array, "L B T K"] | None = None,
        detach_mtp: bool = False,
    ) -> Outputs:
        """Hidden states of every position; `logits` of them are the predictions of the next tokens.

        replay: experts of the trunk's MoE layers, as `Router` takes them. detach_mtp: no gradient of multi-token
        prediction goes to the trunk and the embedding.
        """
        rope = rope_tables(batch.positions, self.cfg)

        def block(x, layer, bias, segment_ids, replay=None):
            def whole(x, rope, segment_ids, replay):
                return layer(x, rope, segment_ids, bias, balance, compute, replay)

            if compute.overlap == "none":
                return whole(x, rope, segment_ids, replay)
            # Neither half waits for the other: what one sends may travel while the other computes.
            (x, said), (y, also) = (whole(*half) for half in halves((x, rope, segment_ids, replay)))
            return join(x, y), jax.tree.map(jnp.add, said, also)

        block = remat(block, compute.remat)
        x = self._embed(batch.tokens, compute)
        x, _ = _scan(lambda x, layer: block(x, layer, None, batch.segment_ids), x, self.dense, compute.scan_layers)

        def moe(x, xs):
            layer, bias, replay = xs
            return block(x, layer, bias, batch.segment_ids, replay)

        x, said = _scan(moe, x, (self.moe, router_bias.moe, replay), compute.scan_layers)
        hidden = self.norm(x)

        held = jax.lax.stop_gradient if detach_mtp else lambda a: a
        depths, mtp_hidden, recycled = [], [], held(hidden if self.cfg.mtp_hidden == "post_norm" else x)
        for k in range(self.cfg.num_nextn_predict_layers):
            read, mtp_block = _layer(self.mtp_input, k), _layer(self.mtp_block, k)
            tokens, segment_ids = look_ahead(batch, k + 1)
            embedding = hide(held(self._embed(tokens, compute)), segment_ids)
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
        if few(hidden):
            return linear(hidden, self.head[...], "vocab")
        out = jnp.einsum("btd,dv->btv", hidden, self.head, preferred_element_type=jnp.float32)
        return constrain(out, "batch", "seq", "vocab")

    def extend(
        self,
        tokens: Int[Array, "B T"],
        pages: LatentCache | KVCache,
        table: Int[Array, "B N"],
        length: Int[Array, "B"],
        router_bias: RouterBias,
        compute: ComputeConfig = ComputeConfig(),
        layers: Layers | None = None,
        replicas: Replicas | None = None,
    ) -> Extended:
        """New tokens of each row behind its `length` tokens, whose pages `table` names (dsjax.model.cache).

        With `layers` (of `unstack`) those blocks are run one after the other. With `replicas` the trunk's experts are
        those of places.
        """
        rope = rope_tables(length[:, None] + jnp.arange(tokens.shape[1]), self.cfg)

        def block(carry, xs):
            (layer, absorbed), n, bias, replicas = xs
            x, pages = carry
            x, pages, routing = layer.extend(
                x, rope, pages, Places(table, length, n), bias, compute, absorbed, replicas
            )
            return (x, pages), routing and routing.indices

        carry = self._embed(tokens, compute), pages
        dense, moe = (layers.dense, layers.moe) if layers else ((self.dense, None), (self.moe, None))
        n_dense, n_layers = self.cfg.first_k_dense_replace, self.cfg.num_hidden_layers
        none, places = [None] * n_dense if layers else None, replicas
        if layers:
            places = [replicas and _layer(replicas, i) for i in range(n_layers - n_dense)]
        carry, _ = _scan(block, carry, (dense, jnp.arange(n_dense), none, none), compute.scan_layers)
        (x, pages), indices = _scan(
            block, carry, (moe, jnp.arange(n_dense, n_layers), router_bias.moe, places), compute.scan_layers
        )
        indices = jnp.stack(indices) if isinstance(indices, list) else indices
        return Extended(self.norm(x), x if self.cfg.mtp_hidden != "post_norm" else None, pages, indices)

    def draft(
        self,
        tokens: Int[Array, "B T"],
        recycled: Float[Array, "B T D"],
        pages: LatentCache | KVCache,
        table: Int[Array, "B N"],
        length: Int[Array, "B"],
        last: Int[Array, "B"],
        router_bias: RouterBias,
        compute: ComputeConfig = ComputeConfig(),
        layers: Layers | None = None,
    ) -> Extended:
        """The first multi-token prediction module, for tokens each behind a place whose hidden state is `recycled`
        (`Extended.recycled`). Its pages are the last layer's; positions are those of the hidden states.

        All tokens go to the cache; what the module says is of each row's place `last` alone, [B, 1, D].
        """
        read = _layer(self.mtp_input, 0)
        mtp, absorbed = layers.mtp[0] if layers else (_layer(self.mtp_block, 0), None)
        layer = jnp.int32(self.cfg.num_hidden_layers)
        embedding, recycled = self._embed(tokens, compute), constrain(recycled, "batch", "seq", None)
        x = read(embedding, recycled, recipe_of(compute).eh_proj)
        if tokens.shape[1] > 1:
            rope = rope_tables(length[:, None] + jnp.arange(tokens.shape[1]), self.cfg)
            pages = mtp.attn.remember(mtp.attn_norm(x), rope, pages, Places(table, length, layer), compute)
            x = place_of(x, last)
        places = Places(table, length + last, layer)
        rope = rope_tables(places.length[:, None], self.cfg)
        x, pages, routing = mtp.extend(x, rope, pages, places, router_bias.mtp[0], compute, absorbed)
        hidden = read.out_norm(x)
        return Extended(hidden, x if self.cfg.mtp_hidden != "post_norm" else None, pages, routing.indices[None])

    def _embed(self, tokens, compute: ComputeConfig):
        table = constrain(self.embed[...], "vocab", None)
        x = table.at[tokens].get(out_sharding=spec("batch", "seq", None))
        return x.astype(recipe_of(compute).dtype)


def place_of(x: Float[Array, "B T N"], place: Int[Array, "B"]) -> Float[Array, "B 1 N"]:
    """One place of each row."""
    chosen = jnp.arange(x.shape[1]) == place[:, None]
    return jnp.sum(jnp.where(chosen[:, :, None], x, 0), axis=1, keepdims=True)


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
    """jax.lax.scan, or the same unrolled; over a list of layers, one after the other, to a list."""
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


def unstack(model: DeepSeek) -> Layers:
    """What decoding on a CPU reads: the blocks one by one, with their weights absorbed."""

    def ready(stacked) -> list:
        blocks = [_layer(stacked, i) for i in range(jax.tree.leaves(stacked)[0].shape[0])]
        return [(block, block.attn.absorbed()) for block in blocks]

    return Layers(*map(ready, (model.dense, model.moe, model.mtp_block)))


def _stack_leaves(trees: list):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
