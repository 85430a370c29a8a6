"""Weights of a transformers model under our names: in memory, by `state_dict()` names, linear weights (out, in)."""

import jax
import numpy as np
from flax import nnx

from dsjax.config import ModelConfig
from dsjax.model.transformer import DeepSeek
from dsjax.precision import weight_name
from dsjax.state import RouterBias


def renamed(tensors: dict[str, np.ndarray], cfg: ModelConfig) -> dict[str, np.ndarray]:
    """Our arrays by our names; layers of a kind stacked. Takes a state dict, or its gradients."""
    k0, n = cfg.first_k_dense_replace, cfg.num_hidden_layers
    out = {
        "embed": tensors["model.embed_tokens.weight"],
        "norm/scale": tensors["model.norm.weight"],
        "head": tensors["lm_head.weight"].T,
    }
    for kind, layers in (("dense", range(k0)), ("moe", range(k0, n))):
        each = [_layer(tensors, f"model.layers.{i}.", cfg, kind) for i in layers]
        out |= {f"{kind}/{name}": np.stack([layer[name] for layer in each]) for name in each[0]}
    return out


def build(tensors: dict[str, np.ndarray], cfg: ModelConfig) -> tuple[DeepSeek, RouterBias]:
    """Our model with those weights, and its router bias. Under a mesh; fails on a name or shape that is not there."""
    arrays = renamed(tensors, cfg)

    def take(path, leaf):
        if leaf.size == 0:  # no MTP
            return np.zeros(leaf.shape, np.float32)
        a = arrays.pop(weight_name(path))
        assert a.shape == leaf.shape, (weight_name(path), a.shape, leaf.shape)
        return jax.device_put(a, leaf.sharding.spec)

    model = jax.tree_util.tree_map_with_path(take, jax.eval_shape(lambda: DeepSeek(cfg, rngs=nnx.Rngs(0))))
    assert not arrays, f"left over: {sorted(arrays)}"
    bias = np.zeros((cfg.num_moe_layers, cfg.n_routed_experts), np.float32)
    for i in range(cfg.num_moe_layers):
        name = f"model.layers.{cfg.first_k_dense_replace + i}.mlp.gate.e_score_correction_bias"
        bias[i] = tensors.get(name, 0)
    return model, RouterBias(jax.device_put(bias), jax.device_put(np.zeros((0, cfg.n_routed_experts), np.float32)))


def _layer(tensors, prefix: str, cfg: ModelConfig, kind: str) -> dict[str, np.ndarray]:
    def get(name):
        return tensors[prefix + name]

    def linear(name):
        return get(f"{name}.weight").T

    h = cfg.num_attention_heads
    out = {
        "attn_norm/scale": get("input_layernorm.weight"),
        "ffn_norm/scale": get("post_attention_layernorm.weight"),
        "attn/wkv_a": linear("self_attn.kv_a_proj_with_mqa"),
        "attn/kv_norm/scale": get("self_attn.kv_a_layernorm.weight"),
        "attn/wkv_b": linear("self_attn.kv_b_proj").reshape(cfg.kv_lora_rank, h, -1),
        "attn/wo": linear("self_attn.o_proj").reshape(h, cfg.v_head_dim, -1),
    }
    if cfg.q_lora_rank is None:
        out["attn/query/wq"] = linear("self_attn.q_proj").reshape(-1, h, cfg.qk_head_dim)
    else:
        out["attn/query/wq_a"] = linear("self_attn.q_a_proj")
        out["attn/query/q_norm/scale"] = get("self_attn.q_a_layernorm.weight")
        out["attn/query/wq_b"] = linear("self_attn.q_b_proj").reshape(-1, h, cfg.qk_head_dim)

    def swiglu(ours: str, theirs: str):
        return {f"{ours}/w_{part}": linear(f"{theirs}.{part}_proj") for part in ("gate", "up", "down")}

    if kind == "dense":
        return out | swiglu("ffn", "mlp")
    gate, up = np.split(get("mlp.experts.gate_up_proj").transpose(0, 2, 1), 2, axis=-1)  # gate rows first
    down = get("mlp.experts.down_proj").transpose(0, 2, 1)
    experts = {"ffn/experts/w_gate": gate, "ffn/experts/w_up": up, "ffn/experts/w_down": down}
    return out | experts | {"ffn/router/weight": linear("mlp.gate")} | swiglu("ffn/shared", "mlp.shared_experts")
