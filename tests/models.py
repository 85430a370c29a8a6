"""The smallest models that have every part, with weights drawn by NumPy (no compilation), and batches for them."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsjax.config import BalanceConfig, ComputeConfig, Config, ModelConfig, OptimizerConfig, RopeScaling, replace
from dsjax.data.tokenizer import bytes_tokenizer
from dsjax.hub.load import Loaded
from dsjax.model import moe as moe_module
from dsjax.model.transformer import DeepSeek, init_router_bias
from dsjax.precision import weight_name
from dsjax.state import Batch, RouterBias, TrainState
from dsjax.train.optimizer import make_optimizer
from dsjax.train.spikes import new_history
from dsjax.train.step import init_state
from sharding.mesh import make_mesh
from sharding.rules import spec

VOCAB = 48
YARN = RopeScaling(factor=4, original_max_position_embeddings=16, beta_fast=4, mscale=0.707, mscale_all_dim=0.707)
COMPUTE = ComputeConfig(grouped_matmul="reference", expert_buffer=None)  # quick to compile; no loads but fit
KNOBS = {"learning_rate": 1e-3, "mtp_weight": 0.3, "bias_update_speed": 0.01, "micro_batches": 1}


def v3(**changes) -> ModelConfig:
    """Compressed queries, sigmoid router in groups, a shared expert, one depth of MTP."""
    base = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=40,
        moe_intermediate_size=16,
        num_hidden_layers=3,
        num_nextn_predict_layers=1,
        num_attention_heads=2,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=12,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        initializer_range=0.2,
    )
    return replace(base, **changes)


def v2(**changes) -> ModelConfig:
    """Plain queries, YaRN, softmax router in groups; no shared expert, which no published model leaves out."""
    base = v3(
        num_nextn_predict_layers=0,
        q_lora_rank=None,
        rope_scaling=YARN,
        n_shared_experts=0,
        scoring_func="softmax",
        topk_method="group_limited_greedy",
        norm_topk_prob=False,
    )
    return replace(base, **changes)


def moe(**changes) -> ModelConfig:
    """DeepSeekMoE: plain multi-head attention, greedy softmax router, two shared experts."""
    base = v2(
        attention="mha",
        qk_nope_head_dim=0,
        v_head_dim=8,
        rope_scaling=None,
        n_shared_experts=2,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
    )
    return replace(base, **changes)


def config(model: ModelConfig, **changes) -> Config:
    """A run of a few steps with every balance loss at work."""
    balance = BalanceConfig(expert=0.003, device=0.05, communication=0.02, n_devices=4)
    if model.topk_method == "noaux_tc":
        balance = BalanceConfig(sequence=0.01)
    optimizer = OptimizerConfig(schedule="constant", warmup_steps=0)
    base = Config(
        model=model, steps=10, batch_size=4, seq_len=16, balance=balance, optimizer=optimizer, compute=COMPUTE
    )
    return replace(base, **changes)


def draw(model: ModelConfig, seed: int = 0) -> tuple[DeepSeek, RouterBias]:
    """A model and its router bias; norms' scales are not all ones, biases not all zero. Under a mesh."""
    rng = np.random.default_rng(seed)

    def value(path, leaf):
        std = model.initializer_range
        a = 1 + 0.2 * rng.normal(size=leaf.shape) if leaf_name(path) == "scale" else std * rng.normal(size=leaf.shape)
        return jax.device_put(a.astype(np.float32), leaf.sharding.spec)

    abstract = jax.eval_shape(lambda: DeepSeek(model, rngs=nnx.Rngs(0)))
    bias = jax.eval_shape(lambda: init_router_bias(model))
    bias = jax.tree.map(lambda a: jnp.asarray(0.1 * rng.normal(size=a.shape), jnp.float32), bias)
    return jax.tree_util.tree_map_with_path(value, abstract), bias


def of_bytes(folder: Path, model: ModelConfig, seq_len: int = 64) -> Loaded:
    """A model on one device as from a run folder, with drawn weights and the tokenizer of bytes, which is put there."""
    bytes_tokenizer().save(folder / "tokenizer.json")
    mesh = make_mesh(jax.devices()[:1])
    with jax.set_mesh(mesh):
        weights, bias = draw(model)
    return Loaded(weights, bias, mesh, Config(model=model, seq_len=seq_len, compute=COMPUTE), folder)


def leaf_name(path) -> str:
    return weight_name(path).split("/")[-1]


def named_leaves(tree) -> dict[str, np.ndarray]:
    """Leaves by name: {"moe/attn/wo": ...}."""
    return {weight_name(path): np.asarray(a) for path, a in jax.tree_util.tree_flatten_with_path(tree)[0]}


def pack(rows: list[list[int]], seq_len: int = 16, seed: int = 0, vocab: int = VOCAB) -> Batch:
    """A batch [B, T] of rows given by their documents' lengths, with random tokens, padded at the end. Under a mesh."""
    rng = np.random.default_rng(seed)
    tokens, segments, positions = (np.zeros((len(rows), seq_len), np.int32) for _ in range(3))
    for b, lengths in enumerate(rows):
        start = 0
        for number, length in enumerate(lengths, 1):
            place = slice(start, start + length)
            tokens[b, place] = rng.integers(vocab, size=length)
            segments[b, place], positions[b, place] = number, np.arange(length)
            start += length
    return Batch(*(jax.device_put(a, spec("batch", "seq")) for a in (tokens, segments, positions)))


def chosen_experts(model: DeepSeek, bias: RouterBias, batch: Batch, compute: ComputeConfig) -> jax.Array:
    """[L, B, T, K] experts that the trunk's routers choose in a forward pass of whole rows."""
    seen, right = [], moe_module.Router.__call__

    def watched(self, *args, **options):
        routing = right(self, *args, **options)
        seen.append(routing.indices)
        return routing

    def run(model, batch):
        seen.clear()
        model(batch, bias, replace(compute, scan_layers=False))
        return jnp.stack(seen[: model.cfg.num_moe_layers])

    moe_module.Router.__call__ = watched
    try:
        return jax.jit(run)(model, batch)
    finally:
        moe_module.Router.__call__ = right


def micro_batches(batch: Batch, n: int) -> Batch:
    """[B, T] cut to [n, B / n, T]. Under a mesh."""
    cut = jax.tree.map(lambda a: np.asarray(a).reshape(n, -1, *a.shape[1:]), batch)
    return jax.tree.map(lambda a: jax.device_put(a, spec(None, "batch", "seq", *(None,) * (a.ndim - 3))), cut)


def knobs(**changes) -> dict[str, jax.Array]:
    return {name: jnp.asarray(value) for name, value in (KNOBS | changes).items()}


def state(config: Config, seed: int = 0) -> TrainState:
    """The state before the first step, with drawn weights. Under a mesh."""
    model, bias = draw(config.model, seed)
    zero = np.zeros((), np.int32)
    ema = None if config.optimizer.ema_decay is None else model
    opt_state = make_optimizer(config.optimizer).init(model)
    state = TrainState(zero, model, opt_state, bias, ema, zero, zero, new_history(config.faults))
    abstract = jax.eval_shape(lambda: init_state(config))
    return jax.tree.map(lambda a, like: jax.device_put(a, getattr(like.sharding, "spec", spec())), state, abstract)


def assert_every_layer_moves(changes: dict[str, np.ndarray]) -> None:
    """Each weight's change has a number other than 0 in each layer."""
    for name, change in changes.items():
        stacked = name.split("/")[0] in ("dense", "moe", "mtp_input", "mtp_block")
        layers = change if stacked else change[None]
        assert all(np.any(layer) for layer in layers), name
