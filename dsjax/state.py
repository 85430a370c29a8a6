"""What changes between calls.

Kept apart from the modules: the shape-checking hook and pytree dataclasses do not mix.
"""

from typing import Any

import jax
from flax import struct


@struct.dataclass
class Batch:
    """Packed rows. Segment 0 is padding; positions start at 0 in every document."""

    tokens: jax.Array  # [B, T] int32
    segment_ids: jax.Array  # [B, T] int32, 1, 2, ... within a row
    positions: jax.Array  # [B, T] int32
    learned: jax.Array | None = None  # [B, T] bool, tokens that the model is to predict; None: all
    teacher_ids: jax.Array | None = None  # [B, T, K] int32, the next tokens that are likeliest to a teacher
    teacher_probs: jax.Array | None = None  # [B, T, K] float32, their probabilities; 0 where none are known


@struct.dataclass
class Routing:
    """Where a router sends tokens. Replayable: indices can be given instead of chosen."""

    indices: jax.Array  # [B, T, K] int32, chosen experts
    weights: jax.Array  # [B, T, K] float32, their share of the output
    scores: jax.Array  # [B, T, E] float32, before bias and choice


@struct.dataclass
class LatentCache:
    """What MLA keeps of past tokens, in pages: one latent per token, shared by all heads."""

    c_kv: jax.Array  # [L, P, S, kv_lora_rank], S tokens a page
    k_rope: jax.Array  # [L, P, S, qk_rope_head_dim]


@struct.dataclass
class KVCache:
    """What plain multi-head attention keeps of past tokens, in pages."""

    k: jax.Array  # [L, P, S, H, head_dim]
    v: jax.Array  # [L, P, S, H, head_dim]


@struct.dataclass
class Places:
    """Where the past of each row lies in the pages of a layer."""

    table: jax.Array  # [B, N] int32, a row's pages in order, among those of its shard; 0: none
    length: jax.Array  # [B] int32, tokens already written
    layer: jax.Array  # [] int32


@struct.dataclass
class Sampling:
    """How each row is sampled."""

    temperature: jax.Array  # [B] float32, 0: the likeliest token
    top_k: jax.Array  # [B] int32, 0: all
    top_p: jax.Array  # [B] float32
    min_p: jax.Array  # [B] float32, of the likeliest token's probability
    seed: jax.Array  # [B] uint32


@struct.dataclass
class Logprobs:
    """Of the tempered distribution, before top-k, top-p and min-p; temperature 0 counts as 1."""

    chosen: jax.Array  # [B, T] float32
    top: jax.Array  # [B, T, 20] float32, falling
    top_ids: jax.Array  # [B, T, 20] int32


@struct.dataclass
class Replicas:
    """Where the experts are, if some have several places: of the trunk's expert layers."""

    place: jax.Array  # [L, E, R] int32, an expert's places one after another, again and again up to R of them
    count: jax.Array  # [L, E] int32, how many different ones


@struct.dataclass
class Weights:
    """All that a program reads and does not change."""

    model: Any  # DeepSeek
    layers: Any  # Layers or None, the blocks one by one, for CPUs
    router_bias: Any  # RouterBias
    replicas: Replicas | None = None


@jax.tree_util.register_pytree_node_class
class Flat:
    """A tree as the list of its leaves: a jitted function would walk through a model's modules at every call."""

    def __init__(self, tree: Any):
        self.leaves, kind = jax.tree.flatten(tree)
        self._kind = _Kind(kind)

    @property
    def tree(self) -> Any:
        return self._kind.structure.unflatten(self.leaves)

    def tree_flatten(self):
        return self.leaves, self._kind

    @classmethod
    def tree_unflatten(cls, kind, leaves):
        flat = object.__new__(cls)
        flat.leaves, flat._kind = list(leaves), kind
        return flat


class _Kind:
    """A tree's structure, compared and hashed once."""

    def __init__(self, structure):
        self.structure, self._hash = structure, hash(structure)

    def __hash__(self):
        return self._hash

    def __eq__(self, other):
        return self is other or (isinstance(other, _Kind) and self.structure == other.structure)


@struct.dataclass
class Rows:
    """The rows of a step, on the host until it begins. A row without a request has only zeros."""

    tokens: jax.Array  # [B, T] int32: a step's last token and drafts; a part of the prompt
    table: jax.Array  # [B, N] int32, pages
    length: jax.Array  # [B] int32, tokens in the cache
    sampling: Sampling
    added: jax.Array  # [B, V] float32, to the logits: logit bias, penalties, what a grammar forbids
    factor: jax.Array  # [B, V] float32: logits above 0 are divided by it, those below multiplied
    want_logprobs: jax.Array  # [] bool


@struct.dataclass
class Stepped:
    """What the host learns of a step."""

    tokens: jax.Array  # [B, T] int32; the first `accepted` + 1 are the text
    accepted: jax.Array  # [B] int32
    drafts: jax.Array  # [B, n_draft] int32, for the next step
    logprobs: Logprobs
    indices: jax.Array  # [expert layers, B, T, K] int32, of the trunk


@struct.dataclass
class TrainState:
    """Everything a step changes. The data position is the step: batch = f(seed, step)."""

    step: jax.Array  # [] int32, steps taken, skipped ones included
    model: Any  # DeepSeek
    opt_state: Any  # optax state
    router_bias: Any  # RouterBias
    ema: Any  # DeepSeek of averaged weights, or None
    skipped: jax.Array  # [] int32, steps skipped for NaN or Inf, or as spikes
    skipped_in_a_row: jax.Array  # [] int32
    history: jax.Array  # [2, spike_window] losses and gradient norms of the last steps taken, NaN before the first


@struct.dataclass
class PolicyState(TrainState):
    """The same, of a policy that is kept near to another one."""

    reference: Any  # DeepSeek, or None where there is no such distance
    reference_bias: Any  # RouterBias or None


@struct.dataclass
class Rollout:
    """Prompts with their answers, one a row. What is said of a token stands at the place before it, whose hidden state
    predicts it."""

    batch: Batch  # [B, T]
    mask: jax.Array  # [B, T] bool, tokens of answers that are learned from
    sampler: jax.Array  # [B, T] float32, log-probability as the sampler said
    old: jax.Array  # [B, T] float32, under the policy that the ratio is to
    reference: Any  # [B, T] float32, under the reference policy, or None
    advantage: jax.Array  # [B] float32
    weights: jax.Array  # [B, T] float32, what each token counts in the whole batch
    fresh: jax.Array  # [B, T] bool, sampled by the weights that learn
    experts: Any  # [L, B, T, K] int32, of the token at this place while sampling, -1: not known; or None


@struct.dataclass
class RouterBias:
    """Bias of the choice of experts, moved by load and not by gradient."""

    moe: jax.Array  # [L - first_k_dense_replace, E] float32
    mtp: jax.Array  # [num_nextn_predict_layers, E] float32


@struct.dataclass
class Metrics:
    """What a step says of itself. Losses in nats a token."""

    loss: jax.Array  # [] next-token cross-entropy
    mtp_loss: jax.Array  # [depth]
    balance_loss: jax.Array  # []
    grad_norm: jax.Array  # [] before clipping
    load: RouterBias  # [layers, E] tokens routed to each expert
    max_vio: jax.Array  # [layers + depth] MaxVio of each MoE layer
    overflow: jax.Array  # [] int32, rows and pairs of this step that did not fit the experts' buffers
    skipped: jax.Array  # [] steps skipped so far
    skipped_in_a_row: jax.Array  # []
    spike: jax.Array  # [] bool, loss or gradient norm far above their medians
    medians: jax.Array  # [2] of the loss and the gradient norm, before this step
    leaf_norms: jax.Array  # [leaves] gradient norm of every weight, before clipping
