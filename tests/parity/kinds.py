"""Every released kind of model, tiny: its config.json, weights equal on every machine, our numbers, and the checks."""

import hashlib
import json
import zlib
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.config import Config, replace
from dsjax.hub.config import from_hub
from dsjax.hub.files import Planned, write_shards
from dsjax.hub.load import Loaded
from dsjax.hub.names import hub_tensors
from dsjax.infer.generate import generate_tokens
from dsjax.precision import weight_name
from dsjax.state import Batch, RouterBias
from dsjax.train.loss import count, total_loss
from sharding.rules import spec

B, T = 2, 48  # three times the positions before YaRN's extension
PROMPT, NEW = 8, 32
GAP = 5e-5  # nearer router scores than this are chosen by rounding
MARGIN = 1e-3  # and nearer logits in greedy decoding

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
    "torch_dtype": "float32",
}
MLA = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 16,
    "v_head_dim": 12,
    "rope_scaling": None,
}
SIGMOID = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True, "num_nextn_predict_layers": 0}
SOFTMAX = {"scoring_func": "softmax", "norm_topk_prob": False}
GROUPS, ONE_GROUP = {"n_group": 4, "topk_group": 2}, {"n_group": 1, "topk_group": 1}


def _yarn(**values) -> dict:
    return {"type": "yarn", "factor": 4, "original_max_position_embeddings": 16, **values}


V3 = COMMON | MLA | SIGMOID | GROUPS | {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
V2 = COMMON | MLA | SOFTMAX | {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2"}
KINDS = {
    # mscale is not mscale_all_dim: YaRN changes the amplitude of cos and sin. theta puts one frequency on the ramp.
    "v3": V3
    | {"n_shared_experts": 1, "routed_scaling_factor": 2.5, "rope_theta": 1000.0}
    | {"rope_scaling": _yarn(beta_fast=4, beta_slow=1, mscale=1.0, mscale_all_dim=0.707)},
    "moonlight": V3
    | ONE_GROUP
    | {"q_lora_rank": None, "routed_scaling_factor": 2.446, "rope_theta": 50000.0, "rms_norm_eps": 1e-5},
    "kimi-k2": V3
    | ONE_GROUP
    | {"model_type": "kimi_k2", "n_shared_experts": 1, "routed_scaling_factor": 2.827, "rope_theta": 50000.0}
    | {"max_position_embeddings": 512}
    | {"rope_scaling": _yarn(factor=32, beta_fast=1, beta_slow=1, mscale=1.0, mscale_all_dim=1.0)},
    "v2": V2
    | GROUPS
    | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0}
    | {"rope_scaling": _yarn(beta_fast=32, beta_slow=1, mscale=0.707, mscale_all_dim=0.707)},
    "v2-lite": V2
    | ONE_GROUP
    | {"topk_method": "greedy", "q_lora_rank": None, "routed_scaling_factor": 1.0}
    | {"rope_scaling": _yarn(beta_fast=32, beta_slow=1, mscale=0.707, mscale_all_dim=0.707)},
    "moe-16b": COMMON
    | SOFTMAX
    | {"architectures": ["DeepseekForCausalLM"], "model_type": "deepseek", "rope_scaling": None},
}
MTP = KINDS["v3"] | {"num_nextn_predict_layers": 1}


def draw(raw: dict) -> dict[str, np.ndarray]:
    """Weights of this config.json under the Hub's names: whole numbers times powers of two, from a raw random stream.

    Neither a library's rounding nor its way from random bits to floats is in them.
    """

    def one(name: str, shape: tuple[int, ...]) -> np.ndarray:
        bits = np.random.PCG64(zlib.crc32(name.encode())).random_raw(int(np.prod(shape))) >> np.uint64(52)
        numbers = bits.astype(np.int64).reshape(shape) - 2048  # -2048 to 2047
        if "norm" in name:
            return np.float32(1 + numbers / 2**13)
        if name.endswith("e_score_correction_bias"):
            return np.float32(numbers / 2**13)
        return np.float32(numbers / 2**12 * 0.75)

    return {t.name: one(t.name, t.shape) for t in hub_tensors(from_hub(raw).model) if not t.copy}


def fingerprint(tensors: dict[str, np.ndarray]) -> str:
    return hashlib.sha256(b"".join(tensors[name].tobytes() for name in sorted(tensors))).hexdigest()[:16]


def write_folder(folder: Path, raw: dict, tensors: dict[str, np.ndarray]) -> Path:
    """A Hub folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    write_shards(folder, [[Planned(name, "F32", a.shape) for name, a in tensors.items()]], iter(tensors.values()))
    return folder


def batch_of(tokens: np.ndarray) -> Batch:
    """Rows of one document each. Under a mesh."""
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    arrays = tokens.astype(np.int32), np.ones(tokens.shape, np.int32), positions
    return Batch(*(jax.device_put(a, spec("batch", "seq")) for a in arrays))


def norms(gradients: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: float(np.linalg.norm(a)) for name, a in gradients.items()}


def loss_and_gradients(model: Loaded, tokens: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
    """The loss that training minimises without its balance terms, and its gradients by the Hub's names."""
    config = replace(model.config, seq_len=tokens.shape[1])
    with jax.set_mesh(model.mesh):
        (loss, _), leaves = _evaluate(model.model, batch_of(tokens), model.router_bias, config)
    leaves = {weight_name(path): np.asarray(a) for path, a in jax.tree_util.tree_flatten_with_path(leaves)[0]}
    tensors = [t for t in hub_tensors(config.model) if not t.copy and not t.leaf.startswith("router_bias")]
    return float(loss), {t.name: t.to_hub(leaves[t.leaf.removeprefix("model/")][t.index]) for t in tensors}


@partial(jax.jit, static_argnums=3)
def _evaluate(model, batch: Batch, router_bias: RouterBias, config: Config):
    counts = count(jax.tree.map(lambda a: a[None], batch), config.model.num_nextn_predict_layers)
    return jax.value_and_grad(total_loss, has_aux=True)(model, batch, router_bias, counts, jnp.float32(0), config)


def greedy(model: Loaded, tokens: np.ndarray) -> list[list[int]]:
    """[B][NEW] tokens after the first PROMPT of each row."""
    prompts = tokens[:, :PROMPT].tolist()
    return generate_tokens(model, prompts, max_tokens=NEW, temperature=0.0)


def mtp_logits(model: Loaded, tokens: np.ndarray) -> np.ndarray:
    """Of the first multi-token prediction module, [B, T, V]; a row's last position has no token to read."""
    with jax.set_mesh(model.mesh):
        return np.asarray(_mtp_logits(model.model, batch_of(tokens), model.router_bias, model.config.compute))


@partial(jax.jit, static_argnums=3)
def _mtp_logits(model, batch: Batch, router_bias: RouterBias, compute):
    return model.logits(model(batch, router_bias, compute).mtp_hidden[0])


def check_logits(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference. transformers' own noise is 1e-5 to 4e-5; a wrong epsilon moves logits by 1e-4."""
    assert expected.std() > 0.5, "logits too small to tell a mistake"
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
    return float(np.abs(got - expected).max())


def check_loss(got: float, expected: float) -> float:
    off = abs(got - expected) / abs(expected)
    assert off < 1e-5, f"loss {got} is not {expected}"
    return off


def check_gradients(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """The largest difference, as a part of the tensor's largest entry."""
    assert got.keys() == expected.keys(), got.keys() ^ expected.keys()
    worst = 0.0
    for name, a in expected.items():
        scale, off = np.abs(a).max(), np.abs(got[name] - a).max()
        assert off <= 1e-3 * scale, f"{name}: gradient off by {off}, largest {scale}"
        worst = max(worst, float(off / scale) if scale else 0.0)
    return worst
