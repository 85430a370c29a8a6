"""What training minimises: next-token cross-entropy, multi-token prediction, and expert balance."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dsjax.config import Config
from dsjax.model.mtp import look_ahead, shift_left
from dsjax.model.transformer import DeepSeek
from dsjax.state import Batch, RouterBias
from sharding.rules import RULES, TOKEN_AXES, constrain, spec, whole

_CHUNK_ELEMENTS = 1 << 22  # logits held at a time on one device: 16 MiB of float32
_CHUNK_TOKENS = 1024  # but no fewer tokens: every chunk reads the head and adds to its gradient


class Counts(NamedTuple):
    """What sums over the whole global batch are divided by."""

    rows: jax.Array  # [] float32
    targets: jax.Array  # [1 + depth] float32: next tokens, then those of each MTP depth


class Teacher(NamedTuple):
    """What a teacher says of each next token: the likeliest ones, and all others as one."""

    ids: jax.Array  # [B, T, K] int32
    probs: jax.Array  # [B, T, K] float32
    share: jax.Array  # [B, T] float32, of the target that is the teacher's; the rest is the token itself


class LossParts(NamedTuple):
    """Parts of one micro-batch's share of the loss, in nats a token; sums over micro-batches are the batch's."""

    loss: jax.Array  # [] next-token cross-entropy, to a mixture with the teacher's where there is one
    mtp_loss: jax.Array  # [depth] cross-entropy of each depth, before its weight
    balance: jax.Array  # [] balance losses with their factors
    load: RouterBias  # [layers, E] tokens routed to each expert
    overflow: jax.Array  # [] int32, rows and pairs of all layers that did not fit the experts' buffers


def count(batch: Batch, depth: int) -> Counts:
    """Counts of all micro-batches [A, B, T] together."""

    def one(batch: Batch) -> Counts:
        targets = [jnp.sum(next_targets(batch, k + 1)[1], dtype=jnp.float32) for k in range(1 + depth)]
        return Counts(jnp.sum(jnp.any(batch.segment_ids > 0, axis=1), dtype=jnp.float32), jnp.stack(targets))

    return jax.tree.map(lambda a: jnp.maximum(jnp.sum(a, axis=0), 1), jax.vmap(one)(batch))


def total_loss(
    model: DeepSeek, batch: Batch, router_bias: RouterBias, counts: Counts, mtp_weight: Float[Array, ""], config: Config
) -> tuple[Float[Array, ""], LossParts]:
    """This micro-batch's share of loss + mtp_weight / depth * sum(mtp_loss) + balance (arXiv:2412.19437, eq. 25)."""
    out = model(batch, router_bias, config.compute, config.balance)
    teachers = (of_teacher(batch, config.data.teacher_weight), *(None for _ in out.mtp_hidden))
    nats = [
        cross_entropy(hidden, model.head[...], *next_targets(batch, k + 1), teacher) / counts.targets[k]
        for k, (hidden, teacher) in enumerate(zip((out.hidden, *out.mtp_hidden), teachers))
    ]
    mtp = jnp.stack(nats[1:]) if nats[1:] else jnp.zeros((0,), jnp.float32)
    balance = sum(out.balance.values(), jnp.zeros((), jnp.float32)) / counts.rows
    total = nats[0] + mtp_weight * jnp.sum(mtp) / max(len(out.mtp_hidden), 1) + balance
    return total, LossParts(nats[0], mtp, balance, out.load, out.overflow)


def next_targets(batch: Batch, n: int) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """The tokens n places on, and which of them count: those of the same document that are to be learned."""
    tokens, segment_ids = look_ahead(batch, n)
    valid = segment_ids > 0
    if batch.learned is not None:
        valid &= shift_left(batch.learned.astype(jnp.int32), n) > 0
    return tokens, valid


def of_teacher(batch: Batch, weight: float) -> Teacher | None:
    """What the teacher says of the batch's next tokens, if anything; this weight is given to it where it is known."""
    if batch.teacher_ids is None:
        return None
    known = jnp.sum(batch.teacher_probs, axis=-1) > 0
    return Teacher(batch.teacher_ids, batch.teacher_probs, jnp.where(known, weight, 0).astype(jnp.float32))


def cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    teacher: Teacher | None = None,
) -> Float[Array, ""]:
    """Sum over valid positions of -log softmax(hidden head)[target], in nats, float32.

    With a teacher, `share` of it is the cross-entropy to its probabilities, of its likeliest tokens and of all others
    together. Less the teacher's entropy this is a divergence of distributions over K + 1 events, and so a lower bound
    of that over all tokens, which says nothing of how the others share what is left to them.

    Logits exist for one chunk of tokens at a time. Where a gradient is wanted it is computed in the same pass, so
    that no chunk is computed twice.
    """
    tokens, wide = spec("batch", "seq"), spec("batch", "seq", None)

    def local(h, w, *others):
        flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), others)
        return lax.psum(_chunked(h.reshape(-1, h.shape[-1]), w, *flat), TOKEN_AXES)

    return jax.shard_map(
        local,
        in_specs=(
            wide,
            spec("embed", "vocab"),
            tokens,
            tokens,
            None if teacher is None else Teacher(wide, wide, tokens),
        ),
        out_specs=spec(),
        check_vma=False,
    )(hidden, constrain(head, "embed", "vocab"), targets, valid, teacher)


def token_logprobs(
    hidden: Float[Array, "B T D"], head: Float[Array, "D V"], targets: Int[Array, "B T"], temperature: Float[Array, ""]
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """log softmax(hidden head / temperature)[target] of every position, and the entropy of that distribution; nats.

    Logits exist for one chunk of tokens at a time, in the backward pass too. No gradient goes through the entropy.
    """
    tokens = spec("batch", "seq")

    def local(h, w, t, temperature):
        w = whole(w, RULES["embed"])
        chunks = _chunks(w, h.reshape(-1, h.shape[-1]), t.reshape(-1))
        logp, entropy = lax.map(jax.checkpoint(lambda chunk: _logprobs(w, *chunk, temperature)), chunks)
        return tuple(a.reshape(-1)[: t.size].reshape(t.shape) for a in (logp, lax.stop_gradient(entropy)))

    return jax.shard_map(
        local,
        in_specs=(spec("batch", "seq", None), spec("embed", "vocab"), tokens, spec()),
        out_specs=(tokens, tokens),
        check_vma=False,
    )(hidden, constrain(head, "embed", "vocab"), targets, temperature)


def all_logits(hidden: Float[Array, "B T D"], head: Float[Array, "D V"]) -> Float[Array, "B T V"]:
    """The logits that `token_logprobs` computes, bit for bit, all at once: for few tokens."""

    def local(h, w):
        w = whole(w, RULES["embed"])
        (chunks,) = _chunks(w, h.reshape(-1, h.shape[-1]))
        logits = lax.map(lambda chunk: _logits(w, chunk), chunks)
        return logits.reshape(-1, w.shape[1])[: h.shape[0] * h.shape[1]].reshape(*h.shape[:2], -1)

    return jax.shard_map(
        local,
        in_specs=(spec("batch", "seq", None), spec("embed", "vocab")),
        out_specs=spec("batch", "seq", "vocab"),
        check_vma=False,
    )(hidden, constrain(head, "embed", "vocab"))


def _logits(w, h):
    return jnp.einsum("nd,dv->nv", h, w, preferred_element_type=jnp.float32)


def _logprobs(w, h, targets, temperature):
    """Of a chunk; w is this device's shard of the vocabulary."""
    logits = _logits(w, h) / temperature
    hot = targets[:, None] == jnp.arange(w.shape[1]) + lax.axis_index("tensor") * w.shape[1]
    top = lax.pmax(lax.stop_gradient(jnp.max(logits, axis=-1)), "tensor")
    exp = jnp.exp(logits - top[:, None])
    total = lax.psum(jnp.sum(exp, axis=-1), "tensor")
    target = lax.psum(jnp.sum(jnp.where(hot, logits, 0), axis=-1), "tensor")
    log_total = jnp.log(total) + top
    mean = lax.psum(jnp.sum(exp * logits, axis=-1), "tensor") / total
    return target - log_total, log_total - mean


@jax.custom_vjp
def _chunked(h, w, targets, valid, teacher):
    w = whole(w, RULES["embed"])
    chunks = _chunks(w, h, targets, valid, teacher)
    return lax.scan(lambda nats, chunk: (nats + _nats(w, *chunk)[0], None), jnp.float32(0), chunks)[0]


def _chunked_fwd(h, w_shard, targets, valid, teacher):
    w = whole(w_shard, RULES["embed"])

    def step(carry, chunk):
        nats, dw = carry
        h, *others = chunk
        n, dlogits = _nats(w, h, *others)
        dlogits = dlogits.astype(h.dtype)
        dh = jnp.einsum("nv,dv->nd", dlogits, w).astype(h.dtype)
        dw += jnp.einsum("nd,nv->dv", h, dlogits, preferred_element_type=jnp.float32)
        return (nats + n, dw), dh

    init = jnp.float32(0), jnp.zeros(w.shape, jnp.float32)
    (nats, dw), dh = lax.scan(step, init, _chunks(w, h, targets, valid, teacher))
    dw = lax.psum_scatter(dw, RULES["embed"], tiled=True)  # here, so that no whole gradient waits for the backward pass
    return nats, (dh.reshape(-1, h.shape[1])[: h.shape[0]], dw.astype(w.dtype))


def _chunked_bwd(grads, g):
    g = lax.psum(g, "tensor")  # every shard of the vocabulary holds a share of the same loss
    return *((g * d.astype(jnp.float32)).astype(d.dtype) for d in grads), None, None, None


_chunked.defvjp(_chunked_fwd, _chunked_bwd)


def _chunks(w, h, *others):
    n = h.shape[0]
    size = min(n, max(_CHUNK_TOKENS, _CHUNK_ELEMENTS // w.shape[1]))
    pad = -n % size
    return jax.tree.map(
        lambda a: jnp.pad(a, ((0, pad), *((0, 0),) * (a.ndim - 1))).reshape(-1, size, *a.shape[1:]), (h, *others)
    )


def _nats(w, h, targets, valid, teacher=None):
    """Sum of a chunk's losses, and its gradient by the logits; w is this device's shard of the vocabulary."""
    logits = _logits(w, h)
    first = lax.axis_index("tensor") * w.shape[1]
    hot = targets[:, None] == jnp.arange(w.shape[1]) + first
    top = lax.pmax(lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)), "tensor")
    exp = jnp.exp(logits - top)
    total = lax.psum(jnp.sum(exp, axis=-1, keepdims=True), "tensor")
    if teacher is None:
        target, wanted = lax.psum(jnp.sum(jnp.where(hot, logits, 0), axis=-1), "tensor"), hot
    else:
        target, wanted = _mixed(logits, exp, top, hot, first, teacher)
    nats = jnp.log(total[:, 0]) + top[:, 0] - target
    return jnp.sum(jnp.where(valid, nats, 0)), jnp.where(valid[:, None], exp / total - wanted, 0)


def _mixed(logits, exp, top, hot, first, teacher: Teacher):
    """The mean logit of the target [n], that of all other tokens being the logarithm of their sum; and what the
    probabilities are drawn to [n, V]: of the other tokens the student's own, scaled to what the teacher leaves them."""
    n, size = logits.shape
    ids = teacher.ids - first
    at = jnp.arange(n)[:, None], jnp.where((ids >= 0) & (ids < size), ids, size)  # size: on another device
    probs = jnp.zeros_like(logits).at[at].add(teacher.probs, mode="drop")
    others = jnp.ones(logits.shape, bool).at[at].set(False, mode="drop")
    rest = lax.psum(jnp.sum(jnp.where(others, exp, 0), axis=-1, keepdims=True), "tensor")
    rest = jnp.maximum(rest, jnp.finfo(jnp.float32).tiny)
    share = teacher.share[:, None]
    left = share * jnp.maximum(1 - jnp.sum(teacher.probs, axis=-1, keepdims=True), 0)
    named = (1 - share) * hot + share * probs
    target = lax.psum(jnp.sum(named * logits, axis=-1), "tensor") + (left * (jnp.log(rest) + top))[:, 0]
    return target, named + jnp.where(others, left * exp / rest, 0)
