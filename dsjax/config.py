"""What a run is: frozen dataclasses that everything reads, their validation, and JSON in and out.

Field names are those of the Hub's config.json wherever it has one (reference section 10.1). Pydantic does the type and
range checks, so that a value from Python, from JSON and from the command line passes the same gate.
"""

import dataclasses
import difflib
import functools
import json
import math
import os
import types
import typing
from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import Field
from pydantic.dataclasses import dataclass

from dsjax.files import write_json

_STRICT = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)


class ConfigError(ValueError):
    """A configuration that cannot be: the message names the field, the value and what would work, in one line."""


@typing.dataclass_transform(frozen_default=True, field_specifiers=(Field,))
def _config(cls):
    """A frozen dataclass whose values are checked, and whose errors are ConfigErrors."""
    cls = dataclass(frozen=True, config=_STRICT)(cls)
    build = cls.__init__

    @functools.wraps(build)
    def __init__(self, *args, **kwargs):
        try:
            build(self, *args, **kwargs)
        except pydantic.ValidationError as error:
            raise ConfigError(_explain(error.errors()[0], cls)) from None

    cls.__init__ = __init__
    return cls


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
    rms_norm_eps: float = Field(1e-6, gt=0, description="epsilon of RMSNorm; of latents' norms 1e-6")
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


# One rule for all that says when: 10e12 is that many tokens, however short this run, and 0.9 is nine tenths of it,
# however long.
_WHEN = "up to 1: part of the run's tokens, above: tokens"


@_config
class BalanceConfig:
    """Expert balance (reference sections 3.3 and 3.4). A loss with factor 0 is not computed."""

    expert: float = Field(0.0, ge=0, description="factor of the expert-level loss (V1, V2)")
    device: float = Field(0.0, ge=0, description="factor of the device-level loss (V1, V2)")
    communication: float = Field(0.0, ge=0, description="factor of the communication loss (V2)")
    sequence: float = Field(0.0, ge=0, description="factor of the sequence-wise loss (V3)")
    n_devices: int = Field(1, gt=0, description="devices D of the device and communication losses")
    bias_update_speed: float = Field(0.001, ge=0, description="step of the router bias (noaux_tc)")
    bias_update_until: float = Field(1.0, ge=0, description=f"where it rests; {_WHEN}")


@_config
class MtpConfig:
    """Loss weight of multi-token prediction."""

    loss_weight: float = Field(0.3, ge=0, description="lambda at the start")
    loss_weight_final: float = Field(0.1, ge=0, description="lambda after `switch_at`")
    switch_at: float = Field(10 / 14.8, ge=0, description=f"where lambda changes; {_WHEN}")


@_config
class Phase:
    """A stretch of the learning rate; the first one begins where the warm-up ends."""

    shape: Literal["constant", "linear", "cosine"] = Field("constant", description="way from the rate before to `rate`")
    until: float = Field(1.0, ge=0, description=f"where it ends; {_WHEN}")
    rate: float = Field(1.0, ge=0, description="learning rate at its end, over peak_lr; constant: all the way")


@_config
class OptimizerConfig:
    """The optimizer and the learning rate's schedule (reference section 7.2)."""

    name: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: of matrices as in Moonlight; AdamW of embedding, head and norms"
    )
    peak_lr: float = Field(2.2e-4, gt=0, description="highest learning rate")
    warmup_steps: int = Field(
        2000, ge=0, description="linear rise from 0; of a schedule in parts, no longer than the run"
    )
    schedule: Literal["constant", "cosine", "step", "phases"] = Field(
        "cosine", description="after the rise: constant, cosine to final_lr_ratio, steps of x0.316, or `phases`"
    )
    phases: tuple[Phase, ...] = Field(
        (), description=f"SHAPE:UNTIL:RATE of each; RATE over peak_lr, the last one stays; UNTIL {_WHEN}"
    )
    final_lr_ratio: float = Field(0.1, ge=0, le=1, description="last over highest rate (cosine)")
    step_at: tuple[float, ...] = Field((0.8, 0.9), description=f"where `step` falls by x0.316; {_WHEN}")
    b1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    b2: float = Field(0.95, ge=0, lt=1, description="decay of the second moment")
    eps: float = Field(1e-8, gt=0, description="AdamW epsilon")
    weight_decay: float = Field(0.1, ge=0, description="decoupled decay of matrices; norms are exempt")
    clip_norm: float = Field(1.0, gt=0, description="largest global gradient norm")
    momentum: float = Field(0.95, ge=0, lt=1, description="of Muon, Nesterov's")
    moments_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="in which moments are kept between steps; they are computed in float32"
    )
    ema_decay: float | None = Field(None, ge=0, lt=1, description="moving average of the weights; none = no average")
    ema_on: Literal["device", "host"] = Field(
        "device", description="where the average is kept: by the step, or in host memory, while the next steps run"
    )

    def __post_init__(self):
        self._check_places("step_at", self.step_at)
        self._check_places("phases", [phase.until for phase in self.phases])
        if self.schedule == "phases" and not self.phases:
            raise ConfigError("optimizer.phases: expected one SHAPE:UNTIL:RATE or more with optimizer.schedule=phases")

    def _check_places(self, name: str, places) -> None:
        if list(places) != sorted(places) or min(places, default=0) < 0:
            raise ConfigError(f"optimizer.{name}={show(getattr(self, name))}: expected rising numbers of tokens")
        if min(places, default=1) <= 1 < max(places, default=1):
            raise ConfigError(
                f"optimizer.{name}={show(getattr(self, name))}: expected tokens, or parts of the run's up to 1, "
                "not both"
            )


@_config
class DataConfig:
    """Where text comes from and how it becomes rows."""

    sources: tuple[str, ...] = Field(
        ("stdlib",),
        min_length=1,
        description="stdlib, or files, folders, globs or folders of `dsjax data build`, each as PATH or PATH:WEIGHT",
    )
    text_field: str = Field("text", description="field of .jsonl, .parquet and ArrayRecord records")
    tokenizer: str = Field(
        "bpe", description="bpe = train one on the corpus; bytes; a tokenizer.json; run = the run folder's (imported)"
    )
    learn: Literal["text", "assistant", "last_turn"] = Field(
        "text",
        description="all tokens of documents, or of conversations (`dsjax sft`) the assistant's or its last turn's",
    )
    teacher_top_k: int = Field(
        0, ge=0, description="next tokens likeliest to a teacher that are kept of each place (`dsjax distill --logits`)"
    )
    teacher_weight: float = Field(
        0.5, ge=0, le=1, description="of the loss that is to the teacher's probabilities; the rest is to the text"
    )
    heldout_fraction: float = Field(0.02, gt=0, lt=1, description="part of the documents kept for evaluation")
    fim_rate: float = Field(0.0, ge=0, le=1, description="part of the documents turned to prefix-suffix-middle")
    packing: Literal["concat", "best_fit"] = Field("concat", description="cut documents at row ends, or fit whole ones")
    document_mask: bool = Field(True, description="attention stays inside a document")
    on_error: Literal["raise", "skip"] = Field(
        "raise", description="a bad line, file or shard: stop, or count and go on"
    )
    split_rate: float = Field(
        0.0, ge=0, le=1, description="part of the tokens of punctuation with line breaks that training sees in two"
    )
    cache: str | None = Field(None, description="folder for shards fetched from afar; none = ~/.cache/dsjax/shards")
    cache_gib: float = Field(64.0, gt=0, description="size that the oldest of them give way at")


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
class DistributedConfig:
    """The processes of this launch; no part of what the run is, and not kept with it."""

    auto: bool = Field(True, description="join the processes of a cluster that JAX finds: Cloud TPU, GKE, Slurm")
    coordinator_address: str | None = Field(None, description="HOST:PORT of process 0; none = found, or one process")
    num_processes: int | None = Field(None, gt=0, description="processes of the job; none = found")
    process_id: int | None = Field(None, ge=0, description="number of this process, from 0; none = found")
    devices: int | None = Field(None, gt=0, description="fake CPU devices of this process (--devices for short)")
    start_timeout_s: int = Field(300, gt=0, description="seconds to wait for all processes to come")
    heartbeat_timeout_s: int = Field(30, gt=1, description="seconds after which a silent process counts as lost")

    def __post_init__(self):
        address, n, p = self.coordinator_address, self.num_processes, self.process_id
        if address is not None and not address.rpartition(":")[2].isdecimal():
            raise ConfigError(f"distributed.coordinator_address={show(address)}: expected HOST:PORT")
        if n is not None and p is not None and p >= n:
            raise ConfigError(f"distributed.process_id={p}: expected a number below distributed.num_processes={n}")


PLAIN = {"float32": "float32", "bfloat16": "bf16"}  # the precision of that dtype in which nothing is quantised
DTYPES = (*PLAIN, "fp8")  # that a model may be loaded in


@_config
class ComputeConfig:
    """How the same numbers are computed."""

    precision: Literal[
        "float32",
        "bf16",
        "fp8_deepseek",
        "fp8_deepseek_ue8m0",
        "fp8_rowwise",
        "fp8_tensor",
        "fp8_block_gradients",
    ] = Field(
        "float32", description="recipe of dsjax.precision: activations' and matmuls' formats; weights are float32"
    )
    remat: Literal["none", "full", "deepseek"] = Field(
        "none", description="recomputed in the backward pass: nothing, whole layers, or norms + up-projections + SwiGLU"
    )
    scan_layers: bool = Field(True, description="one compiled layer for all of a kind")
    grouped_matmul: Literal["auto", "tiles", "pallas_tpu", "pallas_gpu", "ragged_dot", "reference"] = Field(
        "auto", description="implementation of the expert matmul; auto chooses by platform"
    )
    scaled_matmul: Literal["auto", "emulated", "dequantised", "pallas_tpu", "pallas_gpu"] = Field(
        "auto", description="implementation of FP8 matmuls and quantisation; auto chooses by platform"
    )
    attention: Literal["auto", "blocks", "splash", "cudnn"] = Field(
        "auto", description="implementation of attention in training and prefill; auto chooses by platform"
    )
    latent_attention: Literal["auto", "reference", "pallas_tpu", "pallas_gpu"] = Field(
        "auto", description="implementation of decoding on the latent cache; auto chooses by platform"
    )
    exchange: Literal["auto", "ragged", "gather", "pallas_tpu"] = Field(
        "auto", description="how rows go to their experts' devices; auto chooses by platform"
    )
    fp8_dispatch: bool = Field(
        False, description="rows travel to their experts in FP8, with power-of-two scales, and so do gradients"
    )
    expert_buffer: float | None = Field(
        1.5,
        gt=0,
        description="room for rows on an expert's device, over that of even loads, and at least 64 MiB; none = for all",
    )
    on_overflow: Literal["redo", "drop"] = Field(
        "redo", description="rows without room: take the step again with twice the room, or leave them out"
    )
    expert_groups: int = Field(
        1, gt=0, description="groups of devices along mesh.expert; a token crosses to each once; 1 = flat"
    )
    overlap: Literal["none", "batch-split"] = Field(
        "none", description="each layer on two half-batches, so that one's tokens travel while the other computes"
    )


@_config
class FaultsConfig:
    """What is watched for during a run, and what is done about it."""

    on_spike: Literal["note", "skip", "rollback"] = Field(
        "note",
        description="a step whose loss or gradient norm jumps: take it, leave it out, or go back before it and pass "
        "over its documents",
    )
    spike_window: int = Field(64, ge=8, description="steps of the running medians")
    spike_norm: float = Field(10.0, gt=1, description="gradient norm over its median that is a spike")
    spike_loss: float = Field(1.5, gt=1, description="loss over its median that is a spike")
    rollback_steps: int = Field(20, gt=0, description="steps before a spike passed over with its own")
    max_rollbacks: int = Field(10, gt=0, description="rollbacks after which the run stops")
    check_every: int | None = Field(
        None, gt=0, description="steps between checks for silent corruption, a micro-batch on two layouts of devices"
    )
    on_corruption: Literal["stop", "note"] = Field("stop", description="if they disagree: end the run, or say so")
    stall_warn_s: float = Field(30, gt=0, description="seconds without a batch after which the run says so")
    stall_stop_s: float = Field(1800, gt=0, description="seconds without a batch after which it saves and ends")


@_config
class GrpoConfig:
    """Policy optimisation from rewards (reference section 7.5). batch_size counts answers, seq_len is of a prompt with
    its answer."""

    task: str = Field("", description="problems: a .jsonl file, gym:NAME, parity:BITS, or several as TASK:WEIGHT,...")
    rewards: str = Field("", description="PART:WEIGHT of the reward, separated by commas; empty = the task's own")
    style: Literal["r1_zero", "chat", "plain"] = Field(
        "r1_zero", description="how a prompt is put: R1-Zero's preamble, the chat template, or as it is"
    )
    objective: Literal["grpo", "r1", "dr_grpo", "dapo", "gspo", "v3_2"] = Field(
        "r1", description="what is maximised (dsjax.posttrain.objective)"
    )
    clip_low: float | None = Field(None, ge=0, description="ratios below 1 less this gain nothing; none = objective's")
    clip_high: float | None = Field(None, ge=0, description="nor do those above 1 and this; none = objective's")
    kl_weight: float | None = Field(None, ge=0, description="of the distance to the reference; none = objective's")
    group_size: int = Field(16, gt=1, description="answers to a prompt G")
    updates: int = Field(1, gt=0, description="optimizer steps from the answers that were sampled at once")
    temperature: float = Field(1.0, gt=0, le=100, description="of sampling, and of the probabilities that are learned")
    max_tokens: int = Field(256, gt=0, description="longest answer")
    overlong: Literal["keep", "mask", "penalty"] = Field(
        "keep", description="an answer cut off at max_tokens: its reward stands, it is left out, or it pays for length"
    )
    overlong_buffer: int = Field(64, gt=0, description="last tokens of max_tokens over which the penalty grows to 1")
    resample: int = Field(0, ge=0, description="times that groups whose answers have one reward are replaced by others")
    max_staleness: int = Field(
        0, ge=0, description="rounds of sampling that an answer may begin before it is learned from; 0 = none"
    )
    old_policy: Literal["sampler", "trainer"] = Field(
        "sampler", description="whose log-probabilities are the ratio's denominator"
    )
    reference_every: int = Field(400, gt=0, description="steps after which the policy becomes the reference")
    replay: bool = Field(True, description="the experts that sampling chose are those of training")
    router_bias: Literal["frozen", "follow"] = Field("frozen", description="rest, or move by balance.bias_update_speed")
    exact: bool = Field(False, description="sample with the training forward pass, bit for bit: slow, for debugging")
    max_rows: int = Field(256, gt=0, description="answers sampled at once")
    eval_prompts: int = Field(64, ge=0, description="held-out problems asked at an evaluation")
    eval_samples: int = Field(4, gt=0, description="answers to each of them: pass@1 to pass@this")
    eval_temperature: float = Field(1.0, ge=0, le=100, description="of these")


@_config
class EngineConfig:
    """How a model is served."""

    max_rows: int = Field(8, gt=0, description="requests computed at once, over all devices")
    max_model_len: int | None = Field(None, gt=1, description="tokens of a prompt and its text; none = the model's")
    cache_tokens: int | None = Field(None, gt=0, description="tokens in the cache; none = max_rows of max_model_len")
    page_size: int | None = Field(None, gt=0, description="tokens a page of the cache; none = 32 on CPUs, else 128")
    prefill_chunk: int = Field(128, gt=0, description="tokens of a prompt read at once; beginnings shared by prompts")
    prefill_rows: int = Field(1, gt=0, description="prompts read at once, over all devices")
    n_draft: int = Field(1, ge=0, le=8, description="tokens drafted a step by multi-token prediction; 0 = none")
    redundant_experts: int = Field(0, ge=0, description="places for experts beside one each, for those of high load")
    rebalance_steps: int = Field(1000, gt=0, description="steps after which the experts get new places by their load")
    one_shape: bool = Field(False, description="always all rows and pages: slower, and bits do not depend on the load")

    def __post_init__(self):
        size = self.page_size or 32
        if self.prefill_chunk % size:
            raise ConfigError(f"prefill_chunk={self.prefill_chunk}: expected a multiple of page_size={size}")


@_config
class ServerConfig:
    """How it is offered over HTTP."""

    api_key: str | None = Field(None, description="bearer key that /v1 asks for; none = anyone who can connect")
    max_waiting: int = Field(256, ge=0, description="requests that may wait; more get 429")
    max_body_mib: float = Field(8, gt=0, description="largest body of a request")
    body_timeout_s: float = Field(30, gt=0, description="seconds that a body may take to come")
    timeout_s: float = Field(600, gt=0, description="seconds after which a request is ended")
    drain_s: float = Field(30, ge=0, description="seconds that running requests get at the end")


def more_room(compute: ComputeConfig) -> ComputeConfig:
    """The same with twice the room for rows in the experts' buffers."""
    return replace(compute, expert_buffer=2 * compute.expert_buffer)


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
    keep_every: int | None = Field(None, gt=0, description="steps whose checkpoints are kept for good: its multiples")
    keep_best: int = Field(0, ge=0, description="checkpoints of lowest held-out loss kept")
    max_skipped_steps: int = Field(5, gt=0, description="steps with NaN or Inf in a row after which the run stops")
    model: ModelConfig = Field(default_factory=ModelConfig)
    balance: BalanceConfig = Field(default_factory=BalanceConfig)
    mtp: MtpConfig = Field(default_factory=MtpConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    mesh: MeshConfig = Field(default_factory=MeshConfig)
    distributed: DistributedConfig = Field(default_factory=DistributedConfig)
    compute: ComputeConfig = Field(default_factory=ComputeConfig)
    faults: FaultsConfig = Field(default_factory=FaultsConfig)
    grpo: GrpoConfig | None = Field(None, description="policy optimisation; none = a run of another kind")

    def __post_init__(self):
        if self.grpo is not None and self.batch_size % self.grpo.group_size:
            raise ConfigError(
                f"grpo.group_size={self.grpo.group_size}: expected a divisor of batch_size={self.batch_size}"
            )
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
    if not isinstance(values, dict):
        raise ConfigError(f"a configuration: expected a dictionary of fields, got a {type(values).__name__}")
    _check_plain(values, kind, "")
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
        for section in sections:
            kind = _field_type(kind, section)
            if not dataclasses.is_dataclass(kind):
                raise ConfigError(_unknown(name, type(config)))
            if here.get(section) is None:  # model.rope_scaling.factor=40 on a model without YaRN
                here[section] = {}
            here = here[section]
        leaf = _field_type(kind, last)
        if leaf is None:
            raise ConfigError(_unknown(name, type(config)))
        value = _parse(value, kind, last) if isinstance(value, str) else value
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        if dataclasses.is_dataclass(leaf) and not isinstance(value, dict | None):
            raise ConfigError(f"{name}={show(value)}: expected {expected(name, type(config))}")
        here[last] = value
    return from_dict(values, type(config))


def replace(config, **changes):
    """`dataclasses.replace`, checked again."""
    for name in changes:
        if _field_type(type(config), name) is None:
            raise ConfigError(_unknown(name, type(config)))
    return dataclasses.replace(config, **changes)


def save(config: Config, path: str | os.PathLike) -> None:
    """Writes the configuration as JSON; a reader sees the old file or the new one, never a part.

    `distributed` is left out: it is of one launch.
    """
    path = Path(path)
    values = {name: value for name, value in to_dict(config).items() if name != "distributed"}
    write_json(path, values)


def load(path: str | os.PathLike) -> Config:
    """The configuration that `save` wrote. Raises ConfigError that names the file, and the line where it can."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from None
    try:
        values = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}: not JSON: {error.msg} (column {error.colno})") from None
    except (ConfigError, RecursionError, ValueError) as error:
        raise ConfigError(f"{path}: not a configuration: {show(str(error), quote=False)}") from None
    try:
        return from_dict(_renamed(values))
    except ConfigError as error:
        raise ConfigError(f"{path}{_line_of(str(error), text)}: {error}") from None


def _renamed(values: Any) -> Any:
    """The values of an older run in today's names: compute.precision was compute.dtype, V3's phases were a schedule."""
    if not isinstance(values, dict):
        return values
    compute, optimizer = values.get("compute"), values.get("optimizer")
    if isinstance(compute, dict) and "precision" not in compute and compute.get("dtype") in tuple(PLAIN):
        rest = {name: value for name, value in compute.items() if name != "dtype"}
        values = values | {"compute": rest | {"precision": PLAIN[compute["dtype"]]}}
    if isinstance(optimizer, dict) and optimizer.get("schedule") == "v3":
        ends = (
            ("constant", 10, 1),
            ("cosine", 14.3, 0.1),
            ("constant", 14.633, 0.1),
            ("constant", 14.8, 7.3e-6 / 2.2e-4),
        )
        phases = [{"shape": shape, "until": until / 14.8, "rate": rate} for shape, until, rate in ends]
        values = values | {"optimizer": optimizer | {"schedule": "phases", "phases": phases}}
    return values


def field_rows(config, prefix: str = "") -> list[tuple[str, Any, str]]:
    """(dotted name, value, description) of every field, in order."""
    rows = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            rows += field_rows(value, f"{prefix}{field.name}.")
        else:
            description = type(config).__pydantic_fields__[field.name].description
            rows.append((prefix + field.name, value, description or ""))
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


def nearest(name: str, names: typing.Iterable[str]) -> list[str]:
    """The valid names most like `name`, by the whole or by the last part: peak_lr finds optimizer.peak_lr."""

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, name[:100], candidate).ratio()
        last = difflib.SequenceMatcher(None, name[:100], candidate.rpartition(".")[2]).ratio()
        return max(whole, last)

    scores = {candidate: likeness(candidate) for candidate in names}
    return [candidate for candidate, score in scores.items() if score == max(scores.values())][:3]


def expected(name: str, kind: type = Config) -> str:
    """What a field takes, in words: `a whole number greater than 0`."""
    *sections, last = name.replace("-", "_").split(".")
    for section in sections:
        kind = _section(_field_type(kind, section))
    hint = _field_type(kind, last)
    bounds = []
    for bound in kind.__pydantic_fields__[last].metadata:
        for key, words in (("gt", "greater than"), ("ge", "at least"), ("lt", "less than"), ("le", "at most")):
            if hasattr(bound, key):
                bounds.append(f"{words} {getattr(bound, key)}")
    if dataclasses.is_dataclass(hint):
        words = f"its fields one by one, such as {name}.{dataclasses.fields(hint)[0].name}"
    elif typing.get_origin(hint) is Literal:
        words = "one of " + ", ".join(typing.get_args(hint))
    elif typing.get_origin(hint) is tuple:
        item = _section(hint)
        words = "numbers" if typing.get_args(hint)[0] is float else "one text or more"
        if item is not None:
            words = ":".join(field.name.upper() for field in dataclasses.fields(item))
        words += ", separated by commas"
    else:
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[hint]
        words += " " * bool(bounds) + " and ".join(bounds)
    return words + (", or none" if _optional(kind, last) else "")


def show(value: Any, quote: bool = True) -> str:
    """A value as one short line, as one would type it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and abs(value) >= 2**63:  # Python refuses to print the longest ones
        return f"{'-' * (value < 0)}2**{value.bit_length() - 1} or more"
    if isinstance(value, Phase):
        return f"{value.shape}:{value.until:.10g}:{value.rate:.6g}"
    if isinstance(value, tuple | list) and all(isinstance(item, str | int | float | Phase) for item in value):
        return show(",".join(show(item) for item in value))
    try:
        text = value if isinstance(value, str) else repr(value)
    except ValueError:  # an integer that Python refuses to print, somewhere inside
        text = f"a {type(value).__name__}"
    if not text.isprintable() or (quote and isinstance(value, str) and (not text or text != text.strip())):
        text = ascii(text)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


@functools.cache
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


def _section(hint) -> type | None:
    """The dataclass that a field is, or is several of; None for a plain value."""
    if typing.get_origin(hint) is tuple:
        hint = typing.get_args(hint)[0]
    return hint if dataclasses.is_dataclass(hint) else None


def _parse(text: str, kind, name: str) -> Any:
    """A value from the command line; pydantic turns what is left of strings into numbers and booleans."""
    hint = _field_type(kind, name)
    if _optional(kind, name) and text.lower() in ("none", "null"):
        return None
    if typing.get_origin(hint) is tuple:
        parts, item = [part for part in text.split(",") if part], _section(hint)
        if item is None:
            return parts
        names = [field.name for field in dataclasses.fields(item)]
        return [dict(zip(names, part.split(":"))) if part.count(":") == len(names) - 1 else part for part in parts]
    if hint is int and len(text) < 100:
        try:
            number = float(text)  # 469e9 is a fine number of tokens
        except ValueError:
            return text
        return int(number) if "e" in text.lower() and math.isfinite(number) and number.is_integer() else text
    return text


def _check_plain(values: dict, kind, prefix: str) -> None:
    """Refuses what pydantic would take or trip over: keys that are no names, true for a number, enormous integers."""
    for key, value in values.items():
        if not isinstance(key, str):
            raise ConfigError(f"{prefix}{show(key)}: no such field; names are texts")
        hint = _field_type(kind, key)
        if isinstance(value, bool) and hint in (int, float):
            raise ConfigError(f"{prefix}{key}={show(value)}: expected {expected(key, kind)}")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ConfigError(f"{prefix}{show(key)}={show(value)}: expected a number below 2**63")
        inner = _section(hint)
        for item in value if isinstance(value, list | tuple) else [value]:
            if inner is not None and isinstance(item, dict):
                _check_plain(item, inner, f"{prefix}{key}.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ConfigError(f"{show(max(names, key=names.count))} is there twice")
    return values


def _line_of(message: str, text: str) -> str:
    """`, line N` if the field that opens the message stands in exactly one line of the JSON text."""
    key = message.partition(":")[0].partition("=")[0].rpartition(".")[2]
    lines = [i for i, line in enumerate(text.splitlines(), 1) if f'"{key}"' in line]
    return f", line {lines[0]}" if len(lines) == 1 else ""


def _unknown(name: str, kind) -> str:
    name = name.replace("-", "_")
    return f"{show(name)}: no such field; the nearest is {' or '.join(nearest(name, field_names(kind)))}"


def _explain(error: dict[str, Any], kind) -> str:
    """One of pydantic's errors in our words."""
    name = ".".join(str(part) for part in error["loc"] if isinstance(part, str))  # numbers are places in a tuple
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return _unknown(name, kind)
    if "error" in error.get("ctx", {}):  # one of our own checks
        return str(error["ctx"]["error"])
    try:
        return f"{name}={show(error['input'])}: expected {expected(name, kind)}"
    except (KeyError, AttributeError, TypeError):  # an argument by place, say
        return f"{show(name)}: {show(error['msg'], quote=False)}"
