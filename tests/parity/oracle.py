"""The same kinds in Hugging Face transformers (torch, float32), and their numbers.

transformers has no class for DeepSeekMoE-16B. Its oracle is put together from two of its models: Llama's decoder, whose
attention is plain and whose RoPE rotates halves, with the MoE module of DeepSeek-V2 (softmax, greedy, not normalised).
"""

import copy
import json
import re
from dataclasses import dataclass
from pathlib import Path

import kinds
import numpy as np
import torch
import transformers
from kinds import NEW, PROMPT, B, T
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # these models are too small to share
_LLAMA = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_LLAMA += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta", "tie_word_embeddings")
_IN_MEMORY = re.compile(r"(.*\.mlp\.experts\.)(gate_up_proj|down_proj)")


@dataclass(frozen=True)
class Numbers:
    """What a model says of tokens [B, T]."""

    logits: np.ndarray  # [B, T, V]
    loss: float  # mean next-token cross-entropy in nats
    gradients: dict[str, np.ndarray]  # of the loss, by the Hub's names
    greedy: list[list[int]]  # [B][NEW] after the first PROMPT tokens of each row


def build(raw: dict):
    """The model of a config.json, with the class's own weights."""
    if raw["model_type"] == "deepseek":
        config = transformers.LlamaConfig(**{name: raw[name] for name in _LLAMA}, attn_implementation="eager")
        model = transformers.LlamaForCausalLM(config)
        moe = transformers.DeepseekV2Config(**_values(raw))
        for layer in model.model.layers[raw["first_k_dense_replace"] :]:
            layer.mlp = DeepseekV2Moe(moe)
    else:
        cls, config = _class_and_config(raw)
        model = cls(config)
    return _ready(model)


def read(folder: Path):
    """The model of a Hub folder."""
    raw = json.loads((folder / "config.json").read_text())
    if raw["model_type"] != "deepseek":
        cls, config = _class_and_config(raw)
        return _ready(cls.from_pretrained(folder, config=config, dtype=torch.float32))
    from safetensors.torch import load_file

    model, tensors = build(raw), load_file(folder / "model.safetensors")
    for name in model.state_dict():
        if found := _IN_MEMORY.fullmatch(name):
            parts = ("gate", "up") if found[2] == "gate_up_proj" else ("down",)
            experts = range(raw["n_routed_experts"])
            rows = [[tensors.pop(f"{found[1]}{e}.{part}_proj.weight") for part in parts] for e in experts]
            tensors[name] = torch.stack([torch.cat(r) for r in rows])
    model.load_state_dict(tensors)
    return model


def _class_and_config(raw: dict):
    family = "DeepseekV2" if raw["model_type"] == "deepseek_v2" else "DeepseekV3"  # and kimi_k2, as its repository says
    return getattr(transformers, f"{family}ForCausalLM"), getattr(transformers, f"{family}Config")(**_values(raw))


def _values(raw: dict) -> dict:
    values = {name: value for name, value in raw.items() if name not in ("model_type", "architectures")}
    return copy.deepcopy(values) | {"attn_implementation": "eager"}  # the classes add to rope_scaling


def _ready(model):
    model.generation_config.eos_token_id = None  # greedy decoding goes on to NEW tokens
    model.generation_config.pad_token_id = 0
    return model.float().eval()


def randomise(model, raw: dict):
    """Every weight random, those with a constant initial value included."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" in name:
                tensor.uniform_(0.6, 1.4, generator=generator)
            else:
                std = 0.1 if "e_score_correction_bias" in name else raw["initializer_range"]
                tensor.normal_(0, std, generator=generator)
            if "kv_a_proj" in name:
                tensor.div_(8)  # small latents, for which the epsilon of their norm matters
    return model


def save(model, raw: dict, folder: Path) -> Path:
    """A Hub folder by save_pretrained; of the kinds that have no class, by the safetensors library."""
    if raw["model_type"] == "deepseek":
        from safetensors.numpy import save_file

        folder.mkdir(parents=True)
        save_file(on_disk({name: a.numpy() for name, a in model.state_dict().items()}), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(raw))
        return folder
    model.save_pretrained(folder)
    if raw["model_type"] == "kimi_k2":
        written = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(written | {"model_type": "kimi_k2"}))
    return folder


def on_disk(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Names of a state dict, where experts are fused, as on the Hub, where each is a tensor of its own."""
    out = {}
    for name, a in tensors.items():
        found = _IN_MEMORY.fullmatch(name)
        if not found:
            out[name] = a
            continue
        for e, rows in enumerate(a):
            halves = zip(("gate", "up"), np.split(rows, 2)) if found[2] == "gate_up_proj" else [("down", rows)]
            out |= {f"{found[1]}{e}.{part}_proj.weight": np.ascontiguousarray(half) for part, half in halves}
    return out


def theirs(model, tokens: np.ndarray) -> Numbers:
    ids = torch.from_numpy(tokens)
    model.zero_grad()
    out = model(ids, labels=ids)
    out.loss.backward()
    gradients = on_disk({name: p.grad.numpy() for name, p in model.named_parameters()})
    new = _continue(model, ids)[:, PROMPT:]
    return Numbers(out.logits.detach().numpy(), out.loss.item(), gradients, new.tolist())


def _continue(model, ids):
    """The first PROMPT tokens of each row and NEW greedy ones."""
    prompt = ids[:, :PROMPT]
    # The mask is given: generate would take a prompt's token 0 for padding.
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False)


def clear_tokens(model, raw: dict) -> np.ndarray:
    """Tokens [B, T] for which no router's choice, and no greedy one, is a matter of rounding."""
    for seed in range(200):
        tokens = np.random.RandomState(seed).randint(raw["vocab_size"], size=(B, T))
        ids = torch.from_numpy(tokens)
        if smallest_gap(model, ids, raw) < kinds.GAP:
            continue
        whole = _continue(model, ids)
        with torch.no_grad():
            best = model(whole).logits[:, PROMPT - 1 : -1].topk(2).values
        if (best[..., 0] - best[..., 1]).min() > kinds.MARGIN and smallest_gap(model, whole, raw) > kinds.GAP:
            return tokens
    raise AssertionError("no input with a clear choice of experts")


def smallest_gap(model, ids, raw: dict) -> float:
    """Between what a router took and what it left, groups included, over all tokens and layers."""
    gaps, hooks = [np.inf], []
    n_group, topk_group, k = raw.get("n_group", 1), raw.get("topk_group", 1), raw["num_experts_per_tok"]
    sigmoid = raw["scoring_func"] == "sigmoid"

    def see(gate, inputs, _):
        logits = inputs[0].reshape(-1, raw["hidden_size"]).double() @ gate.weight.double().T
        scores = logits.sigmoid() + gate.e_score_correction_bias if sigmoid else logits.softmax(-1)
        groups = scores.reshape(len(scores), n_group, -1)
        rank = groups.topk(2 if sigmoid else 1).values.sum(-1).sort(-1, descending=True)
        if n_group > 1:
            gaps.append((rank.values[:, topk_group - 1] - rank.values[:, topk_group]).min().item())
        kept = torch.zeros_like(rank.values).scatter(1, rank.indices[:, :topk_group], 1.0)
        allowed = groups.masked_fill(kept[..., None] == 0, -torch.inf).flatten(1).sort(-1, descending=True).values
        gaps.append((allowed[:, k - 1] - allowed[:, k]).min().item())

    for layer in model.model.layers[raw["first_k_dense_replace"] :]:
        hooks.append(layer.mlp.gate.register_forward_hook(see))
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return min(gaps)
