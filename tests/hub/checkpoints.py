"""Small random Hub checkpoints on disk."""

import json
from pathlib import Path

import ml_dtypes
import models
import numpy as np

from dsjax.config import ModelConfig, RopeScaling, replace
from dsjax.hub import fp8
from dsjax.hub.config import to_hub
from dsjax.hub.files import DTYPES, NAMES, Planned, plan_shards, write_shards
from dsjax.hub.names import hub_tensors

YARN = RopeScaling(factor=4, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0)
MOE = replace(models.moe(), hidden_size=16, num_attention_heads=2)  # a head of 8
KINDS = {
    "deepseek_v3": models.v3(rope_scaling=YARN),
    "moonlight": models.v3(q_lora_rank=None, num_nextn_predict_layers=0, n_group=1, topk_group=1, n_shared_experts=2),
    "deepseek_v2": models.v2(q_lora_rank=24, n_shared_experts=2, routed_scaling_factor=16.0),
    "deepseek": MOE,
}
WIDE = models.v3(hidden_size=160, q_lora_rank=130, kv_lora_rank=136, moe_intermediate_size=144, intermediate_size=260)


def draw(cfg: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint in float32; the MTP layer's copies equal the shared ones."""
    rng, out = np.random.default_rng(seed), {}
    shared = {"model/embed": "model.embed_tokens.weight", "model/head": "lm_head.weight"}
    for t in hub_tensors(cfg):
        a = rng.normal(size=t.shape).astype(np.float32)
        is_norm = len(t.shape) == 1 and not t.leaf.startswith("router_bias")
        out[t.name] = 1 + 0.2 * a if is_norm else 0.2 * a
    for t in hub_tensors(cfg):
        if t.copy:
            out[t.name] = out[shared[t.leaf]]
    return out


def bfloat16(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All but the router's bias, as the released files have them."""
    return {n: a if n.endswith("correction_bias") else a.astype(ml_dtypes.bfloat16) for n, a in tensors.items()}


def quantised(tensors: dict[str, np.ndarray], cfg: ModelConfig, *, ue8m0: bool = False, scale_dtype: str = "F32"):
    """As FP8 checkpoints: e4m3 with scales where they have them, bfloat16 elsewhere."""
    out = bfloat16(tensors)
    for t in hub_tensors(cfg):
        if t.fp8:
            out[t.name], scale = fp8.quantise(tensors[t.name], ue8m0)
            out[t.name + fp8.SUFFIX] = scale.astype(DTYPES[scale_dtype])
    return out


def write(folder: Path, tensors: dict[str, np.ndarray], cfg: ModelConfig, *, shard_bytes: int = 1 << 40, **changes):
    """The folder with config.json, whose fields are changed by `changes` (None removes one)."""
    is_fp8 = any(a.dtype == fp8.E4M3 for a in tensors.values())
    write_config(folder, cfg, is_fp8=is_fp8, **changes)
    planned = [Planned(n, NAMES[a.dtype], a.shape) for n, a in tensors.items()]
    write_shards(folder, plan_shards(planned, shard_bytes), (a for a in tensors.values() if a.size))
    return folder


def write_config(folder: Path, cfg: ModelConfig, *, is_fp8: bool = False, **changes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    raw = to_hub(cfg, {}, fp8=is_fp8, ue8m0=False, dtype="bfloat16") | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not None or k in _NULLS}))


_NULLS = ("q_lora_rank", "rope_scaling")
