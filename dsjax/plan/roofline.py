"""What a step costs by arithmetic alone: memory, traffic and time of a configuration on a slice, without a compiler.

The search ranks meshes with it, and it stands in where libtpu is not installed. Bytes and FLOPs are computed from
shapes; how much of a peak is reached is assumed, in the constants below, and said to be so.
"""

import dataclasses
import math

from dsjax.config import Config, ModelConfig
from dsjax.plan import count
from dsjax.plan.chips import Topology, axis_bandwidth

# Assumed. Of the matrix units' peak: what MaxText's published 512 x v5p figure (docs/plan.md) comes to in its own FLOPs
# is 0.30 of the peak overall; kernels alone reach more. Of bandwidths: what a ring or a copy commonly reaches.
COMPUTE_REACHED = 0.45
NETWORK_REACHED = 0.8
HBM_REACHED = 0.8
NETWORK_EXPOSED = 0.3  # part of the network's time that nothing is done under

WEIGHT, GRADIENT = 4, 4  # bytes a parameter: float32 weights and gradients

MOMENT = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of one step. Memory in bytes a device, traffic in bytes that a device sends, times in seconds."""

    memory: dict[str, float]  # parameters, optimizer, gradients, activations, temporary
    sent: dict[str, float]  # by mesh axis
    flops: float  # of a device, recomputation included
    model_flops: float  # of a device, what the model itself asks for
    hbm_traffic: float

    @property
    def hbm(self) -> float:
        return sum(self.memory.values())


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of a step: each resource at its published peak, and the prediction."""

    compute: float
    hbm: float
    network: dict[str, float]  # by mesh axis
    roofline: float  # the largest of the three: no step is faster
    predicted: float  # with the parts of the peaks that are assumed to be reached

    @property
    def bound(self) -> str:
        network = sum(self.network.values())
        return max((self.compute, "compute"), (self.hbm, "HBM"), (network, "network"))[1]


def estimate(config: Config, sizes: dict[str, int]) -> Estimate:
    """Arithmetic of a step on a mesh of these sizes."""
    m, c = config.model, config.compute
    width = 4 if c.precision == "float32" else 2
    tokens = config.batch_size * config.seq_len / math.prod(sizes.values()) * sizes["tensor"]  # a device, a step
    micro = tokens / config.accumulate
    weights, experts = _device_weights(m, sizes)
    averaged = config.optimizer.ema_decay is not None and config.optimizer.ema_on == "device"
    n_layers = m.num_hidden_layers + m.num_nextn_predict_layers
    layer = _layer_weights(m, sizes)  # one MoE layer, gathered
    rows = micro * m.num_experts_per_tok
    expert_share = rows * (2 * m.hidden_size + 3 * m.moe_intermediate_size / sizes["tensor"])
    attention = micro * m.num_attention_heads / sizes["tensor"] * (2 * m.qk_head_dim + 2 * m.v_head_dim)
    logits = 3 * (1 << 24) + 4 * m.hidden_size * m.vocab_size / sizes["tensor"] + 2 * width * m.hidden_size * micro
    # Of the experts' three matrices and their gradients, four are whole at a time: so in the compiled 671B step.
    memory = {
        "parameters": (2 if averaged else 1) * WEIGHT * (weights + experts),
        "optimizer": _moments(config, sizes) * MOMENT[config.optimizer.moments_dtype],
        "gradients": GRADIENT * (weights + experts) * (2 if config.accumulate > 1 else 1),
        "activations": width * micro * n_layers * _kept(m, c.remat, sizes),
        "temporary": width * (4 / 3 * layer + 2 * (expert_share + attention)) + logits,
    }
    forward, backward = _flops(config, tokens, sizes)
    recomputed = {"none": 0.0, "full": 1.0, "deepseek": 0.35}[c.remat]
    passes = 2 + (recomputed > 0)  # forward, recomputed forward, backward
    hbm = config.accumulate * passes * 2 * width * layer * n_layers + 7 * WEIGHT * (weights + experts)
    hbm += passes * 12 * width * tokens * m.hidden_size * n_layers + 4 * width * expert_share * n_layers * passes
    return Estimate(
        memory,
        _sent(config, sizes, weights, experts, tokens, width, passes),
        forward * (1 + recomputed) + backward,
        forward + backward,
        hbm,
    )


def times(estimate_: Estimate, topology: Topology, sizes: dict[str, int], slices: int = 1) -> Times:
    """Times of an estimate, or of compiled numbers in its place, on a slice."""
    chip = topology.chip
    compute = estimate_.flops / (chip.bf16_flops / chip.devices)
    hbm = estimate_.hbm_traffic / (chip.hbm_bandwidth / chip.devices)
    speeds = axis_bandwidth(topology, _inside(sizes, slices))
    slowest = min(speeds.values(), default=chip.ici_link)
    network = {}
    for name, sent in estimate_.sent.items():
        axes = name.split("+")
        if slices > 1 and "data" in axes:
            speed = chip.dcn_bandwidth / chip.devices
        else:  # a collective over several axes moves along all their links
            speed = sum(speeds.get(axis, 0.0) for axis in axes) or slowest
        network[name] = sent / speed
    total = sum(network.values())
    busy = max(compute / COMPUTE_REACHED, hbm / HBM_REACHED)
    waits = total / NETWORK_REACHED
    predicted = max(busy + NETWORK_EXPOSED * waits, waits)
    return Times(compute, hbm, network, max(compute, hbm, total), predicted)


def _inside(sizes: dict[str, int], slices: int) -> dict[str, int]:
    return sizes | {"data": max(1, sizes["data"] // slices)}


def _device_weights(m: ModelConfig, sizes: dict[str, int]) -> tuple[float, float]:
    """Parameters of one device: all but the routed experts', and theirs. MTP's are in."""
    n_moe = m.num_moe_layers + m.num_nextn_predict_layers
    routed = n_moe * m.n_routed_experts * 3 * m.hidden_size * m.moe_intermediate_size
    whole = count.parameters(m)
    rest = whole.total + whole.mtp - routed
    shards = sizes["fsdp"] * sizes["tensor"] * sizes["expert"]
    return rest / shards, routed / shards


def _moments(config: Config, sizes: dict[str, int]) -> float:
    """Numbers that the optimizer keeps on a device: AdamW two a parameter; Muon one, but for embedding and head."""
    m, all_weights = config.model, sum(_device_weights(config.model, sizes))
    if config.optimizer.name == "adamw":
        return 2 * all_weights
    return all_weights + 2 * m.vocab_size * m.hidden_size / (sizes["fsdp"] * sizes["tensor"] * sizes["expert"])


def _layer_weights(m: ModelConfig, sizes: dict[str, int]) -> float:
    """Parameters of one MoE layer as a device gathers them to compute with."""
    routed = m.n_routed_experts * 3 * m.hidden_size * m.moe_intermediate_size
    rest = count.attention_parameters(m) + count.moe_parameters(m, 0)
    return (rest + routed / sizes["expert"]) / sizes["tensor"]


def _kept(m: ModelConfig, remat: str, sizes: dict[str, int]) -> float:
    """Numbers a token that one layer keeps for the backward pass."""
    d, heads, tensor = m.hidden_size, m.num_attention_heads, sizes["tensor"]
    k, f = m.num_experts_per_tok, m.moe_intermediate_size / tensor
    if remat == "full":
        return d
    latent = (m.q_lora_rank or 0) + m.kv_lora_rank + m.qk_rope_head_dim
    up = 2 * (k + m.n_shared_experts) * f
    out = heads * m.v_head_dim / tensor
    if remat == "deepseek":
        return 2 * d + latent + out + up + (d if sizes["expert"] > 1 else 0) + k
    return 6 * d + latent + heads / tensor * (2 * m.qk_head_dim + 2 * m.v_head_dim) + 2 * up + 2 * k * d


def _flops(config: Config, tokens: float, sizes: dict[str, int]) -> tuple[float, float]:
    """FLOPs of a device: forward, and backward, which is twice as much. With MTP."""
    m = config.model
    a_token = count.train_flops(m, config.seq_len)
    if m.num_nextn_predict_layers:
        layer = count.attention_parameters(m) + count.moe_parameters(m, m.num_experts_per_tok)
        head = m.hidden_size * m.vocab_size
        attention = m.num_attention_heads * config.seq_len * (m.qk_head_dim + m.v_head_dim) * 3
        a_token += m.num_nextn_predict_layers * (6 * (layer + head + 2 * m.hidden_size**2) + attention)
    work = a_token * tokens / sizes["tensor"]
    return work / 3, 2 * work / 3


def _sent(config, sizes, weights, experts, tokens, width, passes) -> dict[str, float]:
    """Bytes that a device sends, by axis: rings for gathers and sums, all pairs for the experts' tokens."""
    m, sent = config.model, {}
    n_layers = m.num_hidden_layers + m.num_nextn_predict_layers
    n_moe = m.num_moe_layers + m.num_nextn_predict_layers
    # Each pass gathers a layer's shards, the routed experts' over fsdp alone; gradients go back once.
    a_parameter = config.accumulate * (passes * width + GRADIENT)
    for axes, n, held in (
        ("fsdp", sizes["fsdp"], experts),
        ("fsdp+expert" if sizes["expert"] > 1 else "fsdp", sizes["fsdp"] * sizes["expert"], weights),
    ):
        if n > 1:
            sent[axes] = sent.get(axes, 0.0) + (n - 1) * a_parameter * held
    if (n := sizes["data"]) > 1:
        sent["data"] = 2 * (n - 1) / n * GRADIENT * (weights + experts)
    if (n := sizes["expert"]) > 1:
        rows = tokens * min(m.num_experts_per_tok, n)
        exchanged = rows * m.hidden_size * width * (n - 1) / n
        sent["expert"] = 2 * (passes - 1 + 1) * exchanged * n_moe
    if (n := sizes["tensor"]) > 1:
        sent["tensor"] = 2 * passes * 2 * (n - 1) / n * tokens * m.hidden_size * width * n_layers
    if (n := sizes["context"]) > 1:
        latent = m.kv_lora_rank + m.qk_rope_head_dim
        sent["context"] = (passes + 1) * (n - 1) * tokens * latent * width * n_layers
    return sent
