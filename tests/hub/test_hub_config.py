"""config.json of the Hub: every released model, both ways to write RoPE, and errors that name the field."""

import json

import pytest

import configs
from dsjax.config import ConfigError, replace
from dsjax.hub.config import from_hub, is_hub_folder, read_config, to_hub
from dsjax.hub.files import HubError

# As released (reference section 10.1), what the presets do not say included.
V3 = json.loads("""{
  "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "aux_loss_alpha": 0.001, "bos_token_id": 0,
  "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
  "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
  "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
  "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": true, "num_attention_heads": 128,
  "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
  "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
  "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                          "weight_block_size": [128, 128]},
  "rms_norm_eps": 1e-06,
  "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                   "original_max_position_embeddings": 4096, "type": "yarn"},
  "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": true,
  "tie_word_embeddings": false, "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
  "transformers_version": "4.33.1", "use_cache": true, "v_head_dim": 128, "vocab_size": 129280
}""")


@pytest.mark.parametrize("name", [name for name in configs.PRESETS])
def test_every_preset_goes_there_and_back(name):
    model = configs.load(name).model
    raw = json.loads(json.dumps(to_hub(model, {}, fp8=False, ue8m0=False, dtype="bfloat16")))
    assert from_hub(raw).model == model
    assert from_hub(raw).notes == ()


def test_the_released_v3_is_our_preset():
    hub = from_hub(V3)
    assert hub.model == replace(configs.load("v3").model, initializer_range=0.02)
    assert (hub.fp8, hub.ue8m0, hub.notes) == (True, False, ())


def test_an_export_keeps_the_file_as_it_was():
    hub = from_hub(V3)
    again = to_hub(hub.model, V3, fp8=True, ue8m0=False, dtype="bfloat16")
    assert again == {name: value for name, value in V3.items() if name != "auto_map"}
    assert "quantization_config" not in to_hub(hub.model, V3, fp8=False, ue8m0=False, dtype="bfloat16")


def test_both_ways_to_write_rope_are_one():
    scaling = V3["rope_scaling"]
    newer = {name: value for name, value in V3.items() if name not in ("rope_scaling", "rope_theta")}
    newer["rope_parameters"] = scaling | {"rope_type": scaling["type"], "rope_theta": 10000}
    assert from_hub(newer).model == from_hub(V3).model
    del newer["rope_parameters"]["type"]
    assert from_hub(newer).model == from_hub(V3).model
    plain = V3 | {"rope_scaling": None, "rope_theta": 50000.0}
    assert from_hub(plain).model.rope_scaling is None and from_hub(plain).model.rope_theta == 50000.0
    newer["rope_parameters"] = {"rope_type": "default", "rope_theta": 50000.0}
    assert from_hub(newer).model == from_hub(plain).model
    longer = replace(from_hub(newer).model, rope_theta=1e6)
    assert to_hub(longer, newer, fp8=False, ue8m0=False, dtype="bfloat16")["rope_parameters"] == {
        "rope_type": "default",
        "rope_theta": 1e6,
    }


def test_yarn_without_mscale_is_what_the_released_code_takes():
    scaling = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}
    got = from_hub(V3 | {"rope_scaling": scaling}).model.rope_scaling
    assert (got.mscale, got.mscale_all_dim, got.beta_fast, got.beta_slow) == (1.0, 0.0, 32.0, 1.0)


def test_what_writers_leave_out_is_known():
    """transformers' V3 class has no scoring_func and no topk_method."""
    left = {name: value for name, value in V3.items() if name not in ("scoring_func", "topk_method")}
    assert from_hub(left).model == from_hub(V3).model
    assert from_hub(V3 | {"n_shared_experts": None}).model.n_shared_experts == 0
    assert from_hub(V3 | {"q_lora_rank": None}).model.q_lora_rank is None


def test_an_unknown_field_is_kept_and_mentioned():
    hub = from_hub(V3 | {"new_thing": [1, 2]})
    assert hub.notes == ("config.json: new_thing: not known here, kept for export",)
    assert to_hub(hub.model, hub.raw, fp8=True, ue8m0=False, dtype="bfloat16")["new_thing"] == [1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type=llama: expected one of deepseek, deepseek_v2, deepseek_v3, kimi_k2"),
        ({"model_type": "deepseek_v32"}, "model_type=deepseek_v32: expected one of"),
        ({"model_type": None}, "model_type=none"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu: not supported; expected silu"),
        ({"attention_bias": True}, "attention_bias=true: not supported; expected false"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=true"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2: not supported; expected 1"),
        ({"rope_interleave": False}, "rope_interleave=false"),
        ({"num_key_value_heads": 8}, "num_key_value_heads=8: not supported; expected num_attention_heads=128"),
        ({"head_dim": 128}, "head_dim=128: not supported; expected qk_rope_head_dim=64"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.type=linear: not supported; expected yarn"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "rope_scaling.original_max_position_embeddings: missing"),
        ({"rope_scaling": V3["rope_scaling"] | {"truncate": False}}, "rope_scaling.truncate=false: not supported"),
        ({"rope_scaling": V3["rope_scaling"] | {"factor": "x"}}, "rope_scaling.factor=x: expected a number"),
        ({"rope_scaling": 3}, "rope_scaling=3: expected an object or null"),
        ({"scoring_func": "softmax"}, "scoring_func=softmax: topk_method=noaux_tc expects sigmoid"),
        ({"scoring_func": "tanh"}, "scoring_func=tanh: expected one of softmax, sigmoid"),
        ({"n_group": 7}, "n_group=7: expected a divisor of"),
        ({"hidden_size": None}, "hidden_size: missing"),
        ({"hidden_size": "wide"}, "hidden_size=wide: expected a whole number"),
        ({"hidden_size": True}, "hidden_size=true: expected a whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0: expected a whole number greater than 0"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config.quant_method=awq: not supported"),
        ({"quantization_config": {}}, "quantization_config.quant_method=none: not supported; expected fp8"),
        (
            {"quantization_config": V3["quantization_config"] | {"weight_block_size": [64, 64]}},
            "quantization_config.weight_block_size=64,64: not supported; expected 128,128",
        ),
        (
            {"quantization_config": V3["quantization_config"] | {"scale_fmt": "log"}},
            "quantization_config.scale_fmt=log",
        ),
    ],
)
def test_a_value_that_we_do_not_compute_is_an_error_that_names_the_field(tmp_path, changes, message):
    (tmp_path / "config.json").write_text(json.dumps(V3 | changes))
    with pytest.raises(HubError) as error:
        read_config(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: {message}"), str(error.value)
    assert "\n" not in str(error.value)


def test_power_of_two_scales_are_seen():
    assert from_hub(V3 | {"quantization_config": V3["quantization_config"] | {"scale_fmt": "ue8m0"}}).ue8m0


def test_a_run_folder_is_no_hub_folder(tmp_path):
    from dsjax import config

    assert not is_hub_folder(tmp_path)
    config.save(configs.load("tiny"), tmp_path / "config.json")
    assert not is_hub_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(V3))
    assert is_hub_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        is_hub_folder(tmp_path)


def test_v1_has_no_yarn_there():
    model = replace(configs.load("moe_16b").model, rope_scaling=configs.load("v3").model.rope_scaling)
    with pytest.raises(ConfigError, match="no YaRN"):
        to_hub(model, {}, fp8=False, ue8m0=False, dtype="bfloat16")
