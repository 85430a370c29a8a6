"""What a run is: frozen dataclasses that everything reads, their validation, and JSON in and out.

Field names are those of the Hub's config.json wherever it has one (reference section 10.1). Pydantic does the type and
range checks, so that a value from Python, from JSON and from the command line passes the same gate.
"""

import dataclasses
import difflib
import json
import types
import typing
from typing import Any, Literal

import pydantic
from pydantic import Field
from pydantic.dataclasses import dataclass

_STRICT = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)
_config = dataclass(frozen=True, config=_STRICT)


class ConfigError(ValueError):
    """A configuration that cannot be: the message names the field, the value and what would work."""


@_config
class RopeScaling:
    """YaRN (reference section 1.3)."""

    factor: float = Field(40.0, ge=1, description="context extension factor s")
    original_max_position_embeddings: int = Field(4096, gt=0, description="positions seen before the extension")
    beta_fast: float = Field(32.0, gt=0, description="rotations above which a frequency is kept")
    beta_slow: float = Field(1.0, gt=0, description="rotations below which a frequency is divided by factor")
    mscale: float = Field(1.0, ge=0, description="numerator of the cos/sin amplitude")
    mscale_all_dim: float = Field(1.0, ge=0, description="enters the softmax scale squared")


@_config
class ModelConfig:
    """The network. Defaults are no model's; presets in configs/ set every field that matters."""

    vocab_size: int = Field(4096, gt=0, description="rows of the embedding and columns of the head")
    hidden_size: int = Field(128, gt=0, description="width D of the residual stream")
    intermediate_size: int = Field(512, gt=0, description="width of the dense feed-forward layers")
    moe_intermediate_size: int = Field(128, gt=0, description="width of one expert")
    num_hidden_layers: int = Field(4, gt=0, description="layers L, dense ones included, MTP ones not")
    num_nextn_predict_layers: int = Field(0, ge=0, description="depth of multi-token prediction")
    num_attention_heads: int = Field(4, gt=0, description="heads H")
    attention: Literal["mla", "mha"] = Field("mla", description="latent attention, or plain multi-head (DeepSeekMoE)")
    q_lora_rank: int | None = Field(None, gt=0, description="query compression; none = no compression")
    kv_lora_rank: int = Field(64, gt=0, description="latent width C kept in the cache")
    qk_nope_head_dim: int = Field(32, ge=0, description="part of a query/key head without position")
    qk_rope_head_dim: int = Field(16, gt=0, description="part of a query/key head that is rotated")
    v_head_dim: int = Field(32, gt=0, description="width of a value head")
    n_routed_experts: int = Field(16, gt=0, description="routed experts E")
    n_shared_experts: int = Field(1, ge=0, description="experts that every token passes")
    num_experts_per_tok: int = Field(4, gt=0, description="routed experts K a token goes to")
    first_k_dense_replace: int = Field(1, ge=0, description="first layers that are dense")
    n_group: int = Field(1, gt=0, description="expert groups G")
    topk_group: int = Field(1, gt=0, description="groups a token may choose from")
    scoring_func: Literal["softmax", "sigmoid"] = Field("sigmoid", description="router scores")
    topk_method: Literal["greedy", "group_limited_greedy", "noaux_tc"] = Field("noaux_tc", description="router")
    norm_topk_prob: bool = Field(True, description="normalise the chosen scores to sum to 1")
    routed_scaling_factor: float = Field(1.0, gt=0, description="factor of the routed experts' sum")
    rope_theta: float = Field(10000.0, gt=0, description="RoPE base")
    rope_scaling: RopeScaling | None = Field(None, description="YaRN, or none")
    max_position_embeddings: int = Field(4096, gt=0, description="longest context")
    rms_norm_eps: float = Field(1e-6, gt=0, description="epsilon of every RMSNorm")
    initializer_range: float = Field(0.006, gt=0, description="standard deviation of initial weights")
    mtp_hidden: Literal["post_norm", "pre_norm"] = Field(
        "post_norm", description="trunk hidden state that MTP reads: after or before the final norm"
    )

    def __post_init__(self):
        e, g, k = self.n_routed_experts, self.n_group, self.num_experts_per_tok
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise ConfigError(
                f"model.first_k_dense_replace={self.first_k_dense_replace}: expected at most "
                f"model.num_hidden_layers={self.num_hidden_layers}"
            )
        if e % g:
            raise ConfigError(f"model.n_group={g}: expected a divisor of model.n_routed_experts={e}")
        if self.topk_group > g:
            raise ConfigError(f"model.topk_group={self.topk_group}: expected at most model.n_group={g}")
        if k > self.topk_group * (e // g):
            raise ConfigError(
                f"model.num_experts_per_tok={k}: expected at most the {self.topk_group * (e // g)} experts in "
                f"{self.topk_group} of {g} groups"
            )
        if self.topk_method == "noaux_tc" and g > 1 and e // g < 2:
            raise ConfigError(f"model.n_group={g}: noaux_tc sums two experts a group, {e} experts give {e // g}")
        if self.topk_method == "greedy" and g > 1:
            raise ConfigError(f"model.n_group={g}: topk_method=greedy has no groups, expected 1")
        if (self.topk_method == "noaux_tc") != (self.scoring_func == "sigmoid"):
            raise ConfigError(
                f"model.scoring_func={self.scoring_func}: topk_method={self.topk_method} expects "
                f"{'sigmoid' if self.topk_method == 'noaux_tc' else 'softmax'}"
            )
        if self.qk_rope_head_dim % 2:
            raise ConfigError(f"model.qk_rope_head_dim={self.qk_rope_head_dim}: expected an even number")
        if self.attention == "mha" and (self.qk_nope_head_dim or self.qk_rope_head_dim != self.v_head_dim):
            raise ConfigError(
                "model.attention=mha: expected qk_nope_head_dim=0 and qk_rope_head_dim=v_head_dim (one head width), "
                f"got {self.qk_nope_head_dim}, {self.qk_rope_head_dim} and {self.v_head_dim}"
            )

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_moe_layers(self) -> int:
        return self.num_hidden_layers - self.first_k_dense_replace


@_config
class BalanceConfig:
    """Expert balance (reference sections 3.3 and 3.4). A loss with factor 0 is not computed."""

    expert: float = Field(0.0, ge=0, description="factor of the expert-level loss (V1, V2)")
    device: float = Field(0.0, ge=0, description="factor of the device-level loss (V1, V2)")
    communication: float = Field(0.0, ge=0, description="factor of the communication loss (V2)")
    sequence: float = Field(0.0, ge=0, description="factor of the sequence-wise loss (V3)")
    n_devices: int = Field(1, gt=0, description="devices D of the device and communication losses")
    bias_update_speed: float = Field(0.001, ge=0, description="step of the router bias (noaux_tc)")
    bias_update_until: float = Field(1.0, ge=0, le=1, description="part of the run's tokens after which it rests")


@_config
class MtpConfig:
    """Loss weight of multi-token prediction."""

    loss_weight: float = Field(0.3, ge=0, description="lambda at the start")
    loss_weight_final: float = Field(0.1, ge=0, description="lambda after `switch_at`")
    switch_at: float = Field(10 / 14.8, ge=0, le=1, description="part of the run's tokens at which lambda changes")


@_config
class OptimizerConfig:
    """AdamW and its schedule (reference section 7.2)."""

    peak_lr: float = Field(2.2e-4, gt=0, description="highest learning rate")
    warmup_steps: int = Field(2000, ge=0, description="linear rise from 0")
    schedule: Literal["constant", "cosine", "step", "v3"] = Field(
        "v3", description="after the rise: constant, cosine to final_lr_ratio, steps of x0.316, or V3's four phases"
    )
    final_lr_ratio: float = Field(0.1, ge=0, le=1, description="last over highest rate (cosine)")
    step_at: tuple[float, ...] = Field((0.8, 0.9), description="parts of the run's tokens where `step` falls by x0.316")
    b1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    b2: float = Field(0.95, ge=0, lt=1, description="decay of the second moment")
    eps: float = Field(1e-8, gt=0, description="AdamW epsilon")
    weight_decay: float = Field(0.1, ge=0, description="decoupled decay of matrices; norms are exempt")
    clip_norm: float = Field(1.0, gt=0, description="largest global gradient norm")
    ema_decay: float | None = Field(None, ge=0, lt=1, description="moving average of the weights; none = no average")


@_config
class DataConfig:
    """Where text comes from and how it becomes rows."""

    sources: tuple[str, ...] = Field(
        ("stdlib",), min_length=1, description="stdlib, or files, folders and globs, each as PATH or PATH:WEIGHT"
    )
    text_field: str = Field("text", description="field of .jsonl, .parquet and ArrayRecord records")
    tokenizer: str = Field("bpe", description="bpe = train one on the corpus; bytes; or a tokenizer.json")
    heldout_fraction: float = Field(0.02, gt=0, lt=1, description="part of the documents kept for evaluation")
    fim_rate: float = Field(0.0, ge=0, le=1, description="part of the documents turned to prefix-suffix-middle")
    packing: Literal["concat", "best_fit"] = Field("concat", description="cut documents at row ends, or fit whole ones")
    document_mask: bool = Field(True, description="attention stays inside a document")
    on_error: Literal["raise", "skip"] = Field("raise", description="a bad line or file: stop, or count and go on")


@_config
class MeshConfig:
    """Devices along each axis; one axis may be -1 and takes what is left."""

    data: int = Field(1, description="replicas")
    fsdp: int = Field(-1, description="fully sharded data parallel")
    expert: int = Field(1, description="experts")
    context: int = Field(1, description="sequence")
    tensor: int = Field(1, description="heads, feed-forward width, vocabulary")
    stage: int = Field(1, description="pipeline stages")

    def __post_init__(self):
        sizes = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name, size in sizes.items():
            if size < 1 and size != -1:
                raise ConfigError(f"mesh.{name}={size}: expected a positive number, or -1 for what is left")
        if list(sizes.values()).count(-1) > 1:
            raise ConfigError(f"mesh: expected at most one axis of -1, got {sizes}")


@_config
class ComputeConfig:
    """How the same numbers are computed."""

    dtype: Literal["float32", "bfloat16"] = Field("float32", description="activations and matmuls; weights are float32")
    remat: Literal["none", "full", "deepseek"] = Field(
        "none", description="recomputed in the backward pass: nothing, whole layers, or norms + up-projections + SwiGLU"
    )
    scan_layers: bool = Field(True, description="one compiled layer for all of a kind")
    grouped_matmul: Literal["auto", "tiles", "ragged_dot", "reference"] = Field(
        "auto", description="implementation of the expert matmul; auto chooses by platform"
    )


@_config
class Config:
    """A whole run. `dsjax config NAME` prints one; every run keeps its own as config.json."""

    name: str = Field("custom", description="preset it comes from")
    seed: int = Field(0, ge=0, description="of weights, data order and samples")
    steps: int = Field(1000, gt=0, description="optimizer steps")
    batch_size: int = Field(16, gt=0, description="rows a step, over all devices and micro-batches")
    accumulate: int = Field(1, gt=0, description="micro-batches a step")
    seq_len: int = Field(256, gt=1, description="tokens a row T")
    batch_size_start: int | None = Field(None, gt=0, description="rows a step at first; none = no ramp")
    batch_ramp_tokens: int = Field(0, ge=0, description="tokens over which the batch grows to batch_size")
    log_every: int = Field(10, gt=0, description="steps between lines of metrics")
    eval_every: int = Field(200, gt=0, description="steps between held-out evaluations")
    checkpoint_every: int = Field(200, gt=0, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, gt=0, description="newest checkpoints kept")
    max_skipped_steps: int = Field(5, gt=0, description="steps with NaN or Inf in a row after which the run stops")
    model: ModelConfig = Field(default_factory=ModelConfig)
    balance: BalanceConfig = Field(default_factory=BalanceConfig)
    mtp: MtpConfig = Field(default_factory=MtpConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    mesh: MeshConfig = Field(default_factory=MeshConfig)
    compute: ComputeConfig = Field(default_factory=ComputeConfig)

    def __post_init__(self):
        if self.batch_size % self.accumulate:
            raise ConfigError(f"accumulate={self.accumulate}: expected a divisor of batch_size={self.batch_size}")
        rows, start = self.batch_size // self.accumulate, self.batch_size_start
        if start is not None and (start > self.batch_size or start % rows):
            raise ConfigError(
                f"batch_size_start={start}: expected a multiple of batch_size/accumulate={rows}, "
                f"at most batch_size={self.batch_size}"
            )
        if start is not None and not self.batch_ramp_tokens:
            raise ConfigError(f"batch_ramp_tokens=0: expected a positive number with batch_size_start={start}")
        if self.seq_len > self.model.max_position_embeddings:
            raise ConfigError(
                f"seq_len={self.seq_len}: expected at most "
                f"model.max_position_embeddings={self.model.max_position_embeddings}"
            )
        if self.model.n_routed_experts % self.balance.n_devices:
            raise ConfigError(
                f"balance.n_devices={self.balance.n_devices}: expected a divisor of "
                f"model.n_routed_experts={self.model.n_routed_experts}"
            )


def to_dict(config) -> dict[str, Any]:
    """The configuration as nested plain values, ready for JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(values: dict[str, Any], kind: type = Config):
    """A configuration of `kind` from nested plain values.

    Raises ConfigError, one line that names the field, the value, what was expected and the nearest valid name.
    """
    try:
        return pydantic.TypeAdapter(kind).validate_python(values)
    except pydantic.ValidationError as error:
        raise ConfigError(_explain(error.errors()[0], kind)) from None


def override(config: Config, changes: dict[str, Any]) -> Config:
    """`config` with fields replaced by dotted name, `{"optimizer.peak_lr": "1e-3"}`; strings are parsed by type.

    Raises ConfigError as from_dict does.
    """
    values = to_dict(config)
    for name, value in changes.items():
        *sections, last = name.replace("-", "_").split(".")
        here, kind = values, type(config)
        for depth, section in enumerate(sections):
            kind = _field_type(kind, section)
            if not dataclasses.is_dataclass(kind):
                raise ConfigError(_unknown(name, type(config)))
            if here.get(section) is None:  # model.rope_scaling.factor=40 on a model without YaRN
                here[section] = {}
            here = here[section]
        leaf = _field_type(kind, last)
        if leaf is None:
            raise ConfigError(_unknown(name, type(config)))
        here[last] = _parse(value, kind, last) if isinstance(value, str) else value
    return from_dict(values, type(config))


def replace(config, **changes):
    """`dataclasses.replace`, checked again."""
    return dataclasses.replace(config, **changes)


def field_rows(config, prefix: str = "") -> list[tuple[str, Any, str]]:
    """(dotted name, value, description) of every field, in order."""
    rows = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            rows += field_rows(value, f"{prefix}{field.name}.")
        else:
            rows.append((prefix + field.name, value, _description(field)))
    return rows


def field_names(kind: type = Config, prefix: str = "") -> list[str]:
    """Every dotted name of a configuration, those of optional sections included."""
    names = []
    for field in dataclasses.fields(kind):
        inner = _field_type(kind, field.name)
        if dataclasses.is_dataclass(inner):
            names += field_names(inner, f"{prefix}{field.name}.")
        if not dataclasses.is_dataclass(inner) or _optional(kind, field.name):
            names.append(prefix + field.name)
    return names


def _hints(kind) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _optional(kind, name: str) -> bool:
    hint = _hints(kind)[name]
    return isinstance(hint, types.UnionType) and type(None) in typing.get_args(hint)


def _field_type(kind, name: str):
    """The type of a field without its `| None`; None if there is no such field."""
    hint = _hints(kind).get(name)
    if isinstance(hint, types.UnionType):
        hint = next(t for t in typing.get_args(hint) if t is not type(None))
    return hint


def _description(field: dataclasses.Field) -> str:
    return getattr(field.default, "description", None) or ""


def _parse(text: str, kind, name: str) -> Any:
    """A value from the command line; pydantic turns what is left of strings into numbers and booleans."""
    if _optional(kind, name) and text.lower() in ("none", "null"):
        return None
    if typing.get_origin(_field_type(kind, name)) is tuple:
        return [part for part in text.split(",") if part]
    return text


def _unknown(name: str, kind) -> str:
    name = name.replace("-", "_")
    near = difflib.get_close_matches(name, field_names(kind), n=1, cutoff=0.0)[0]
    return f"{name}: no such field; the nearest is {near}"


def _explain(error: dict[str, Any], kind) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return _unknown(name, kind)
    if "error" in error.get("ctx", {}):  # one of our own checks
        return str(error["ctx"]["error"])
    if error["type"] == "missing":
        return f"{name}: missing"
    wanted = error["msg"].removeprefix("Input should be ").split(", unable")[0]
    return f"{name}={error['input']}: expected {wanted}"
