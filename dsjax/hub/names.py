"""Which tensor of a Hub checkpoint is which part of which of our leaves: one table, read in both directions.

Reference sections 2.1, 4.2 and 10.2. On the Hub a linear weight is (out, in), every layer and every expert is a tensor
of its own; ours are (in, out) with heads apart, layers and experts stacked. RoPE pairs are interleaved in both, save in
DeepSeekMoE's, which rotates halves.
"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from dsjax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class HubTensor:
    """One tensor of a checkpoint, and where it lies in ours."""

    name: str  # "model.layers.3.self_attn.o_proj.weight"
    leaf: str  # ours, "model/moe/attn/wo" or "router_bias/moe"
    index: tuple[int, ...]  # its place in the leaf's leading axes: layer, expert
    part: tuple[int, ...]  # shape of the leaf behind those axes
    n_in: int | None = None  # leading axes of `part` that make up the input; None: not a linear weight, no transpose
    fp8: bool = False  # a matrix that FP8 checkpoints quantise
    halves: bool = False  # rotates halves: the last axis of `part` is not in our order
    copy: bool = False  # the MTP layer's own copy of the embedding or the head

    @property
    def shape(self) -> tuple[int, ...]:
        """As in the file: (out, in) of a linear weight."""
        if self.n_in is None:
            return self.part
        return math.prod(self.part[self.n_in :]), math.prod(self.part[: self.n_in])

    @property
    def row_axis(self) -> int:
        """The axis of `part` along which the file's rows run."""
        return 0 if self.n_in is None else self.n_in

    @property
    def rows_each(self) -> int:
        """The file's rows for one step along `row_axis`: 1, or a head's width."""
        return math.prod(self.part[self.row_axis + 1 :]) if self.n_in is not None else 1

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """Rows and columns of the file's tensor, whole heads of them, as a block of `part`."""
        if self.n_in is None:
            return array
        out = list(self.part)
        out[self.row_axis] = array.shape[0] // self.rows_each
        out[0] = array.shape[1] // math.prod(self.part[1 : self.n_in])
        block = array.T.reshape(out)
        if self.halves:
            block = np.stack(np.split(block, 2, axis=-1), axis=-1).reshape(block.shape)
        return block

    def to_hub(self, block: np.ndarray) -> np.ndarray:
        """A block of `part` as rows and columns of the file's tensor: the inverse of `to_ours`."""
        if self.n_in is None:
            return block
        if self.halves:
            block = np.concatenate([block[..., 0::2], block[..., 1::2]], axis=-1)
        return block.reshape(math.prod(block.shape[: self.n_in]), -1).T

    def file_slices(self, place: tuple[slice, ...]) -> tuple[slice, ...]:
        """The file's (rows, columns) that hold a block of `part`; inner axes of a group of axes must be whole."""
        ranges = [s.indices(n)[:2] for s, n in zip(place, self.part)]
        if self.n_in is None:
            return tuple(slice(*r) for r in ranges)
        groups = (range(self.n_in, len(self.part)), range(self.n_in))
        return tuple(self._fold(ranges, list(axes)) for axes in groups)

    def _fold(self, ranges, axes: list[int]) -> slice:
        inner = math.prod(self.part[axis] for axis in axes[1:])
        if any(ranges[axis] != (0, self.part[axis]) for axis in axes[1:]):
            raise ValueError(f"{self.name}: axis {axes[1]} of {self.part} cannot be cut")
        start, stop = ranges[axes[0]]
        return slice(start * inner, stop * inner)


def hub_tensors(cfg: ModelConfig) -> list[HubTensor]:
    """Every tensor that a checkpoint of this model holds, in the Hub's order of layers."""
    return list(_all(cfg))


def _all(cfg: ModelConfig) -> Iterator[HubTensor]:
    d, v, k0, n = cfg.hidden_size, cfg.vocab_size, cfg.first_k_dense_replace, cfg.num_hidden_layers
    yield HubTensor("model.embed_tokens.weight", "model/embed", (), (v, d))
    for layer in range(n):
        kind, i = ("dense", layer) if layer < k0 else ("moe", layer - k0)
        yield from _block(cfg, f"model.layers.{layer}.", kind, i)
    for k in range(cfg.num_nextn_predict_layers):
        at = f"model.layers.{n + k}."
        yield HubTensor(f"{at}embed_tokens.weight", "model/embed", (), (v, d), copy=True)
        yield HubTensor(f"{at}enorm.weight", "model/mtp_input/enorm/scale", (k,), (d,))
        yield HubTensor(f"{at}hnorm.weight", "model/mtp_input/hnorm/scale", (k,), (d,))
        yield HubTensor(f"{at}eh_proj.weight", "model/mtp_input/eh_proj", (k,), (2 * d, d), 1)
        yield from _block(cfg, at, "mtp", k)
        yield HubTensor(f"{at}shared_head.norm.weight", "model/mtp_input/out_norm/scale", (k,), (d,))
        yield HubTensor(f"{at}shared_head.head.weight", "model/head", (), (d, v), 1, copy=True)
    yield HubTensor("model.norm.weight", "model/norm/scale", (), (d,))
    yield HubTensor("lm_head.weight", "model/head", (), (d, v), 1)


def _block(cfg: ModelConfig, at: str, kind: str, i: int) -> Iterator[HubTensor]:
    """The tensors of one decoder layer. kind: dense, moe or mtp; i: its place among those."""
    d, h, c = cfg.hidden_size, cfg.num_attention_heads, cfg.kv_lora_rank
    ours = "model/mtp_block" if kind == "mtp" else f"model/{kind}"

    def vector(name: str, leaf: str, n: int) -> HubTensor:
        return HubTensor(f"{at}{name}.weight", f"{ours}/{leaf}", (i,), (n,))

    def linear(name: str, leaf: str, part: tuple[int, ...], n_in: int = 1, index: tuple[int, ...] = (i,), **marks):
        return HubTensor(f"{at}{name}.weight", f"{ours}/{leaf}", index, part, n_in, **({"fp8": True} | marks))

    def swiglu(name: str, leaf: str, f: int, index: tuple[int, ...] = (i,)):
        for part, shape in (("gate", (d, f)), ("up", (d, f)), ("down", (f, d))):
            yield linear(f"{name}.{part}_proj", f"{leaf}/w_{part}", shape, index=index)

    yield vector("input_layernorm", "attn_norm/scale", d)
    if cfg.attention == "mha":
        for part in "qkv":
            yield linear(f"self_attn.{part}_proj", f"attn/w{part}", (d, h, cfg.v_head_dim), halves=part != "v")
    else:
        if cfg.q_lora_rank is None:
            yield linear("self_attn.q_proj", "attn/query/wq", (d, h, cfg.qk_head_dim))
        else:
            yield linear("self_attn.q_a_proj", "attn/query/wq_a", (d, cfg.q_lora_rank))
            yield vector("self_attn.q_a_layernorm", "attn/query/q_norm/scale", cfg.q_lora_rank)
            yield linear("self_attn.q_b_proj", "attn/query/wq_b", (cfg.q_lora_rank, h, cfg.qk_head_dim))
        yield linear("self_attn.kv_a_proj_with_mqa", "attn/wkv_a", (d, c + cfg.qk_rope_head_dim))
        yield vector("self_attn.kv_a_layernorm", "attn/kv_norm/scale", c)
        yield linear("self_attn.kv_b_proj", "attn/wkv_b", (c, h, cfg.qk_nope_head_dim + cfg.v_head_dim))
    yield linear("self_attn.o_proj", "attn/wo", (h, cfg.v_head_dim, d), 2)
    yield vector("post_attention_layernorm", "ffn_norm/scale", d)
    if kind == "dense":
        yield from swiglu("mlp", "ffn", cfg.intermediate_size)
        return
    yield linear("mlp.gate", "ffn/router/weight", (d, cfg.n_routed_experts), fp8=False)
    if cfg.topk_method == "noaux_tc":
        name = f"{at}mlp.gate.e_score_correction_bias"
        yield HubTensor(name, f"router_bias/{kind}", (i,), (cfg.n_routed_experts,))
    for e in range(cfg.n_routed_experts):
        yield from swiglu(f"mlp.experts.{e}", "ffn/experts", cfg.moe_intermediate_size, (i, e))
    if cfg.n_shared_experts:
        yield from swiglu("mlp.shared_experts", "ffn/shared", cfg.n_shared_experts * cfg.moe_intermediate_size)
