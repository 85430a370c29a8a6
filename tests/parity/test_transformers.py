"""Logits and gradients of tiny random models against Hugging Face transformers' DeepSeek classes, in float32."""

import functools

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest

from dsjax.config import ModelConfig, RopeScaling, replace
from dsjax.state import Batch
from dsjax.train.loss import count, total_loss
from sharding.rules import spec

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.23")

from hub_weights import build, renamed  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_device")

B, T = 2, 24
GAP = 5e-5  # nearer scores than this are chosen by rounding
YARN = RopeScaling(factor=4, original_max_position_embeddings=16, beta_fast=4, mscale=1.0, mscale_all_dim=0.707)
BASE = models.v3(num_nextn_predict_layers=0, n_routed_experts=16, num_experts_per_tok=4)
SOFTMAX = {"scoring_func": "softmax", "norm_topk_prob": False, "n_shared_experts": 2, "rope_scaling": YARN}
ONE_GROUP = {"n_group": 1, "topk_group": 1}
CASES = {
    "v3": replace(BASE, rope_scaling=YARN),
    "v3 without query compression, groups and YaRN": replace(BASE, q_lora_rank=None, **ONE_GROUP),
    "v2": replace(BASE, **SOFTMAX, topk_method="group_limited_greedy", routed_scaling_factor=16.0),
    "v2-lite": replace(BASE, **SOFTMAX, **ONE_GROUP, q_lora_rank=None, topk_method="greedy", routed_scaling_factor=1.0),
}


def theirs(cfg: ModelConfig):
    """A transformers model of this shape; its norms and correction biases are not their initial ones and zeros."""
    family = "DeepseekV3" if cfg.topk_method == "noaux_tc" else "DeepseekV2"
    rope = {"rope_type": "default", "rope_theta": cfg.rope_theta}
    if cfg.rope_scaling is not None:
        rope |= {"rope_type": "yarn"} | vars(cfg.rope_scaling)
    ours = {"attention", "scoring_func", "rope_theta", "rope_scaling", "mtp_hidden"}  # all others are the Hub's names
    fields = {name: value for name, value in vars(cfg).items() if name not in ours and not name.startswith("_")}
    config = getattr(transformers, f"{family}Config")(
        **fields, num_key_value_heads=cfg.num_attention_heads, rope_parameters=rope, attn_implementation="eager"
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" in name:
                tensor.uniform_(0.6, 1.4)
            elif "e_score_correction_bias" in name:
                tensor.normal_(0, 0.1)
            else:  # routers and experts are not all drawn by initializer_range
                tensor.normal_(0, cfg.initializer_range)
    return model


def smallest_gap(model, tokens, cfg: ModelConfig) -> float:
    """Between what a router took and what it left, groups included, over all tokens and layers."""
    gaps, hooks = [np.inf], []

    def see(gate, inputs, _):
        logits = inputs[0].reshape(-1, cfg.hidden_size).double() @ gate.weight.double().T
        scores = (
            logits.sigmoid() + gate.e_score_correction_bias if cfg.scoring_func == "sigmoid" else logits.softmax(-1)
        )
        groups = scores.reshape(len(scores), cfg.n_group, -1)
        rank = groups.topk(2 if cfg.scoring_func == "sigmoid" else 1).values.sum(-1).sort(-1, descending=True)
        if cfg.n_group > 1:
            gaps.append((rank.values[:, cfg.topk_group - 1] - rank.values[:, cfg.topk_group]).min().item())
        kept = torch.zeros_like(rank.values).scatter(1, rank.indices[:, : cfg.topk_group], 1.0)
        allowed = groups.masked_fill(kept[..., None] == 0, -torch.inf).flatten(1).sort(-1, descending=True).values
        k = cfg.num_experts_per_tok
        gaps.append((allowed[:, k - 1] - allowed[:, k]).min().item())

    for layer in model.model.layers[cfg.first_k_dense_replace :]:
        hooks.append(layer.mlp.gate.register_forward_hook(see))
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return min(gaps)


@functools.cache
def pair(name: str):
    """(their model, tokens that no router finds close, our model, our router bias)."""
    cfg = CASES[name]
    model = theirs(cfg)
    for seed in range(20):
        tokens = torch.randint(cfg.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))
        if smallest_gap(model, tokens, cfg) > GAP:
            break
    else:
        pytest.fail("no input with a clear choice of experts")
    return model, tokens, *build(as_numpy(model.state_dict()), cfg)


def as_numpy(tensors) -> dict[str, np.ndarray]:
    return {name: np.array(tensor.detach().numpy()) for name, tensor in tensors.items()}


def batch_of(tokens) -> Batch:
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    arrays = tokens.numpy().astype(np.int32), np.ones((B, T), np.int32), positions
    return Batch(*(jax.device_put(a, spec("batch", "seq")) for a in arrays))


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name):
    model, tokens, ours, bias = pair(name)
    with torch.no_grad():
        expected = model(tokens).logits.numpy()
    forward = jax.jit(lambda m, batch: m.logits(m(batch, bias, models.COMPUTE).hidden))
    got = np.asarray(forward(ours, batch_of(tokens)))
    assert expected.std() > 0.5
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_gradients_of_the_loss_are_those_of_transformers():
    model, tokens, ours, bias = pair("v3")
    cfg = CASES["v3"]
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    expected = renamed(as_numpy({name: p.grad for name, p in model.named_parameters()}), cfg)
    config = replace(models.config(cfg, seq_len=T), balance=models.BalanceConfig())

    @jax.jit
    def evaluate(ours, batch):
        counts = count(jax.tree.map(lambda a: a[None], batch), 0)
        return jax.value_and_grad(total_loss, has_aux=True)(ours, batch, bias, counts, jnp.float32(0), config)

    (got, _), gradients = evaluate(ours, batch_of(tokens))
    assert float(got) == pytest.approx(loss.item(), rel=1e-5)
    gradients = {name: a for name, a in models.named_leaves(gradients).items() if a.size}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(gradient, expected[name], atol=1e-4 * scale, err_msg=name)
