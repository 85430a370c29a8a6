"""A Hub checkpoint's config.json as our ModelConfig, and back (reference section 10.1).

A value that our model does not compute is an error that names the field; a field that we do not know is kept for export
and mentioned.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dsjax.config import ConfigError, ModelConfig, RopeScaling, from_dict, show
from dsjax.hub.files import HubError, read_json
from dsjax.hub.fp8 import BLOCK

MODEL_TYPES = {
    "deepseek": "DeepseekForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
}
# Of the same name there and here.
_SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "n_routed_experts",
    "num_experts_per_tok",
    "first_k_dense_replace",
)
_MLA = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
# Of the same name, and left out by some writers: what transformers' configuration classes then take.
_V3 = {
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
}
_SOFTMAX = {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False}
_DEFAULTS = {"deepseek": _V3 | _SOFTMAX, "deepseek_v2": _V3 | _SOFTMAX, "deepseek_v3": _V3, "kimi_k2": _V3}
# Fields that change the numbers, with the one value that we compute.
_ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "moe_layer_freq": 1,
    "rope_interleave": True,
    "pretraining_tp": 1,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
}
# Fields that change nothing here: names of classes and files, what training and serving elsewhere want.
_IDLE = {
    *(
        "architectures",
        "auto_map",
        "model_type",
        "torch_dtype",
        "dtype",
        "transformers_version",
        "use_cache",
        "ep_size",
    ),
    *("aux_loss_alpha", "seq_aux", "output_router_logits", "num_key_value_heads", "head_dim", "qk_head_dim"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "rope_theta", "rope_scaling", "rope_parameters"),
    *("quantization_config", "router_aux_loss_coef", "_name_or_path", "return_dict", "output_hidden_states"),
    *("output_attentions", "chunk_size_feed_forward", "problem_type", "id2label", "label2id", "unsloth_fixed"),
}
_YARN = tuple(f.name for f in fields(RopeScaling))


@dataclass(frozen=True)
class HubConfig:
    """What a config.json says: the network, the FP8 format if any, and the file as it is."""

    model: ModelConfig
    fp8: bool = False  # blocks of 128 x 128, e4m3
    ue8m0: bool = False  # whose scales are powers of two
    raw: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what a user should hear


def is_hub_folder(folder: Path | str) -> bool:
    """Whether the folder's config.json is a Hub one: it has a model_type, which a run's has not."""
    path = Path(folder) / "config.json"
    return path.is_file() and "model_type" in read_json(str(path), path.read_bytes())


def read_config(folder: Path | str) -> HubConfig:
    """The configuration of a checkpoint folder. Raises HubError that names the file, the field and its value."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise HubError(f"{path}: no such file; expected the config.json of a Hub checkpoint")
    raw = read_json(str(path), path.read_bytes())
    try:
        return from_hub(raw)
    except ConfigError as error:
        raise HubError(f"{path}: {str(error).replace('model.', '')}") from None


def from_hub(raw: dict[str, Any]) -> HubConfig:
    """The same from the file's values. Raises ConfigError."""
    kind = raw.get("model_type")
    if kind not in MODEL_TYPES:
        raise ConfigError(f"model_type={show(kind)}: expected one of {', '.join(MODEL_TYPES)}")
    given = {name: value for name, value in raw.items() if value is not None}
    missing = [name for name in (*_SAME, *(_MLA[1:] if kind != "deepseek" else ())) if name not in given]
    if missing:
        raise ConfigError(f"{missing[0]}: missing; expected a whole number")
    for name, only in _ONLY.items():
        if given.get(name, only) != only:
            raise ConfigError(f"{name}={show(given[name])}: not supported; expected {show(only)}")
    values = {name: given[name] for name in _SAME}
    values |= {name: given.get(name, default) for name, default in _DEFAULTS[kind].items()}
    heads = values["num_attention_heads"]
    _equal(given, "num_key_value_heads", heads, "num_attention_heads")
    if kind == "deepseek":
        if values["hidden_size"] % heads:
            raise ConfigError(f"num_attention_heads={heads}: expected a divisor of hidden_size={values['hidden_size']}")
        width = values["hidden_size"] // heads
        values |= {"attention": "mha", "qk_nope_head_dim": 0, "qk_rope_head_dim": width, "v_head_dim": width}
    else:
        values |= {name: raw.get(name) for name in _MLA}
        _equal(given, "head_dim", values["qk_rope_head_dim"], "qk_rope_head_dim")
    if "n_shared_experts" in raw and raw["n_shared_experts"] is None:
        values["n_shared_experts"] = 0
    if kind != "deepseek":
        _equal(given, "qk_head_dim", values["qk_nope_head_dim"] + values["qk_rope_head_dim"], "nope + rope")
    if values["topk_method"] == "greedy":  # V2-Lite's one group of one
        values |= {"n_group": 1, "topk_group": 1}
    values |= _rope(given)
    fp8, ue8m0 = _quantization(given.get("quantization_config"))
    known = {*values, *_ONLY, *_IDLE}
    unknown = sorted(name for name in raw if name not in known)
    notes = (f"config.json: {', '.join(unknown)}: not known here, kept for export",) if unknown else ()
    return HubConfig(from_dict(values, ModelConfig), fp8, ue8m0, raw, notes)


def to_hub(model: ModelConfig, raw: dict[str, Any], *, fp8: bool, ue8m0: bool, dtype: str | None) -> dict[str, Any]:
    """The config.json of an export, from that of the import or {}. Raises ConfigError for a model it cannot name."""
    kind = raw.get("model_type")
    if kind is None:
        kind = (
            "deepseek"
            if model.attention == "mha"
            else "deepseek_v3"
            if model.topk_method == "noaux_tc"
            else "deepseek_v2"
        )
    if kind == "deepseek":
        width = model.hidden_size // model.num_attention_heads
        if model.v_head_dim != width or model.rope_scaling is not None:
            raise ConfigError(
                f"model.v_head_dim={model.v_head_dim}: the Hub's deepseek format has hidden_size / "
                f"num_attention_heads = {width}, and no YaRN"
            )
    same = (*_SAME, *(() if kind == "deepseek" else _MLA), *_DEFAULTS[kind])
    out = dict(raw) or {
        "architectures": [MODEL_TYPES[kind]],
        "model_type": kind,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "moe_layer_freq": 1,
        "num_key_value_heads": model.num_attention_heads,
        "tie_word_embeddings": False,
        "use_cache": True,
    }
    out |= {name: getattr(model, name) for name in same}
    out["num_key_value_heads"] = model.num_attention_heads
    out.pop("auto_map", None)  # names Python files that do not travel with the weights
    rope = _rope_to_hub(model)
    before = from_hub(raw).model if raw else None
    if before and (before.rope_theta, before.rope_scaling) == (model.rope_theta, model.rope_scaling):
        pass  # as they wrote it
    elif "rope_parameters" in raw:
        out["rope_parameters"] = {"rope_theta": model.rope_theta, "rope_type": "default"} | rope
        out.pop("rope_scaling", None)
    else:
        out |= {
            "rope_theta": model.rope_theta,
            "rope_scaling": {"type": rope.pop("rope_type"), **rope} if rope else None,
        }
    name = "dtype" if "dtype" in raw else "torch_dtype"
    out[name] = dtype or raw.get(name, "bfloat16")
    out.pop("quantization_config", None)
    if fp8:
        kept = raw.get("quantization_config") or {}
        out["quantization_config"] = kept or {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [BLOCK, BLOCK],
            **({"scale_fmt": "ue8m0"} if ue8m0 else {}),
        }
    return out


def _equal(given: dict[str, Any], name: str, value: Any, what: str) -> None:
    if given.get(name, value) != value:
        raise ConfigError(f"{name}={show(given[name])}: not supported; expected {what}={show(value)}")


def _rope(given: dict[str, Any]) -> dict[str, Any]:
    """rope_theta and rope_scaling from either style: rope_scaling beside rope_theta, or rope_parameters with both."""
    where = "rope_parameters" if "rope_parameters" in given else "rope_scaling"
    rope = given.get(where) or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"{where}={show(rope)}: expected an object or null")
    rope = {name: value for name, value in rope.items() if value is not None}
    theta = rope.pop("rope_theta", given.get("rope_theta", 10000.0))
    kinds = {rope.pop(name) for name in ("type", "rope_type") if name in rope} or {"default"}
    kind = kinds.pop()
    if kinds or kind not in ("yarn", "default"):
        raise ConfigError(f"{where}.type={show(kind)}: not supported; expected yarn, or {where}=null")
    _equal(rope, "partial_rotary_factor", 1.0, f"{where}.partial_rotary_factor")
    rope.pop("partial_rotary_factor", None)
    if kind == "default":
        if rope:
            raise ConfigError(f"{where}.{min(rope)}={show(rope[min(rope)])}: not supported without type=yarn")
        return {"rope_theta": theta, "rope_scaling": None}
    unknown = sorted(set(rope) - set(_YARN))
    if unknown:
        raise ConfigError(f"{where}.{unknown[0]}={show(rope[unknown[0]])}: not supported; expected {', '.join(_YARN)}")
    for name in ("factor", "original_max_position_embeddings"):
        if name not in rope:
            raise ConfigError(f"{where}.{name}: missing; YaRN needs it")
    # What the released code takes where the file is silent; our own default of mscale_all_dim is V3's value.
    scaling = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0} | rope
    return {"rope_theta": theta, "rope_scaling": scaling}


def _rope_to_hub(model: ModelConfig) -> dict[str, Any]:
    return (
        {}
        if model.rope_scaling is None
        else {"rope_type": "yarn", **{n: getattr(model.rope_scaling, n) for n in _YARN}}
    )


def _quantization(given: dict[str, Any] | None) -> tuple[bool, bool]:
    """Whether the weights are in FP8 blocks, and whether their scales are powers of two."""
    if given is None:
        return False, False
    if not isinstance(given, dict):
        raise ConfigError(f"quantization_config={show(given)}: expected an object")
    expected = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [BLOCK, BLOCK],
        "activation_scheme": "dynamic",
    }
    for name, value in expected.items():
        if given.get(name, value) != value or (name == "quant_method" and name not in given):
            raise ConfigError(
                f"quantization_config.{name}={show(given.get(name))}: not supported; expected {show(value)}"
            )
    scale = given.get("scale_fmt")
    if scale not in (None, "float", "ue8m0"):
        raise ConfigError(f"quantization_config.scale_fmt={show(scale)}: not supported; expected ue8m0, or none")
    return True, scale == "ue8m0"
