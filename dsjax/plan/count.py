"""What a model is made of, in closed form: parameters, cache, FLOPs. Arithmetic on a ModelConfig, without JAX.

`dsjax presets` prints these numbers. They follow the DeepSeek papers' own (reference sections 1.5, 1.6 and 2.4) to the
last digit.
"""

import dataclasses
from typing import Any

from dsjax.config import Config, ModelConfig

BYTES = 2  # of one cached bfloat16 element


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Parameters of a model; router biases are counted, MTP stands apart.

    The papers say `activated` in three ways: DeepSeekMoE counts embedding and head, V2 and V3 one of the two (looking
    up an embedding is no matmul), Moonlight neither.
    """

    total: int
    active_body: int
    active_body_head: int
    active_body_embed_head: int
    mtp: int  # of all depths, without the embedding and head that they share with the trunk


@dataclasses.dataclass(frozen=True)
class Cache:
    """Cached elements a token over all layers: of the model, and of its shape with other attentions."""

    own: int
    mha: int
    gqa8: int


def parameters(model: ModelConfig) -> Parameters:
    """The model's parameters, all of them and those that one token passes."""
    body = body_parameters(model, model.num_experts_per_tok)
    embedding = model.vocab_size * model.hidden_size  # the head is as large
    return Parameters(
        total=body_parameters(model, model.n_routed_experts) + 2 * embedding,
        active_body=body,
        active_body_head=body + embedding,
        active_body_embed_head=body + 2 * embedding,
        mtp=mtp_parameters(model),
    )


def body_parameters(model: ModelConfig, n_routed: int) -> int:
    """All layers and the final norm, with `n_routed` routed experts counted in every MoE layer."""
    d, n_moe = model.hidden_size, model.num_moe_layers
    layers = model.num_hidden_layers * (attention_parameters(model) + 2 * d)
    return layers + model.first_k_dense_replace * dense_parameters(model) + n_moe * moe_parameters(model, n_routed) + d


def attention_parameters(model: ModelConfig) -> int:
    """One attention, its inner norms included."""
    d, h, qk, v = model.hidden_size, model.num_attention_heads, model.qk_head_dim, model.v_head_dim
    out = h * v * d
    if model.attention == "mha":
        return 2 * d * h * qk + d * h * v + out
    q, c = model.q_lora_rank, model.kv_lora_rank
    query = d * h * qk if q is None else d * q + q + q * h * qk
    return query + d * (c + model.qk_rope_head_dim) + c + c * h * (model.qk_nope_head_dim + v) + out


def dense_parameters(model: ModelConfig) -> int:
    """The feed-forward of a dense layer."""
    return 3 * model.hidden_size * model.intermediate_size


def moe_parameters(model: ModelConfig, n_routed: int) -> int:
    """The feed-forward of an MoE layer with `n_routed` of its routed experts: experts, router, router bias."""
    expert = 3 * model.hidden_size * model.moe_intermediate_size
    router = model.n_routed_experts * model.hidden_size
    bias = model.n_routed_experts if model.topk_method == "noaux_tc" else 0
    return (n_routed + model.n_shared_experts) * expert + router + bias


def router_biases(model: ModelConfig) -> int:
    """Entries of all router biases: moved by load, not by gradient, so a state dict lists them among its buffers."""
    return model.num_moe_layers * model.n_routed_experts if model.topk_method == "noaux_tc" else 0


def mtp_parameters(model: ModelConfig) -> int:
    """What multi-token prediction adds: per depth the projection, three norms and one MoE layer."""
    d = model.hidden_size
    layer = attention_parameters(model) + 2 * d + moe_parameters(model, model.n_routed_experts)
    return model.num_nextn_predict_layers * (2 * d * d + 3 * d + layer)


def cache(model: ModelConfig) -> Cache:
    """Cached elements a token; with fewer than eight heads, GQA-8 is MHA."""
    layers, heads = model.num_hidden_layers, model.num_attention_heads
    mha = 2 * heads * model.v_head_dim * layers
    latent = (model.kv_lora_rank + model.qk_rope_head_dim) * layers
    return Cache(
        own=mha if model.attention == "mha" else latent,
        mha=mha,
        gqa8=2 * min(8, heads) * model.v_head_dim * layers,
    )


def train_flops(model: ModelConfig, seq_len: int, causal: bool = True) -> int:
    """FLOPs a token of forward and backward: 6 a parameter (body and head), and attention over rows of `seq_len`.

    Without MTP and recomputation, as in arXiv:2505.09343, Table 2.
    """
    head = model.qk_head_dim + model.v_head_dim
    attention = 6 * model.num_hidden_layers * model.num_attention_heads * seq_len * head
    return 6 * parameters(model).active_body_head + (attention // 2 if causal else attention)


def summary(config: Config) -> dict[str, Any]:
    """Every number of a preset that `dsjax presets` shows, exact and ready for JSON."""
    model, kept = config.model, cache(config.model)
    return {
        "name": config.name,
        "parameters": dataclasses.asdict(parameters(model)),
        "attention": model.attention,
        "layers": {"total": model.num_hidden_layers, "dense": model.first_k_dense_replace},
        "experts": {
            "routed": model.n_routed_experts,
            "shared": model.n_shared_experts,
            "per_token": model.num_experts_per_tok,
        },
        "cache_elements_per_token": dataclasses.asdict(kept),
        "cache_bytes_per_token": {name: BYTES * n for name, n in dataclasses.asdict(kept).items()},
        "train_flops_per_token": {
            "seq_len": config.seq_len,
            "causal": train_flops(model, config.seq_len),
            "non_causal": train_flops(model, config.seq_len, causal=False),
        },
    }


def human(number: int) -> str:
    """A count with four digits and a suffix: 671.0B."""
    for size, suffix in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            short = number / size
            return f"{short:.{1 if short >= 10 else 2}f}{suffix}"
    return str(number)


def human_number(text: str) -> float:
    """What `human` prints, and plain numbers: 14.8T is 1.48e13. Raises ValueError."""
    sizes = {"T": 1e12, "B": 1e9, "M": 1e6, "K": 1e3}
    return float(text[:-1]) * sizes[text[-1].upper()] if text[-1:].upper() in sizes and text[-1:] else float(text)
