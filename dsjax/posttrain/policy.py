"""The step of policy optimisation: gradients of micro-batches of answers, and one update from their sum."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from dsjax.config import ComputeConfig, Config, GrpoConfig, replace
from dsjax.model.balance import max_violation
from dsjax.model.mtp import look_ahead, shift_left
from dsjax.model.transformer import DeepSeek
from dsjax.posttrain.objective import OBJECTIVES, Objective, policy_loss
from dsjax.precision import cast_weights
from dsjax.state import Batch, PolicyState, Rollout, RouterBias
from dsjax.train.loss import cross_entropy, token_logprobs
from dsjax.train.step import updated


class Counts(NamedTuple):
    """What sums over all micro-batches of a step are divided by, float32."""

    rows: jax.Array  # [] answers
    targets: jax.Array  # [depth] tokens of answers that each depth of multi-token prediction predicts


class Parts(NamedTuple):
    """Of one micro-batch; sums over micro-batches are the step's."""

    loss: jax.Array  # [] of the policy
    mtp_loss: jax.Array  # [depth] nats a token, before its weight
    balance: jax.Array  # []
    load: RouterBias  # [layers, E] tokens
    overflow: jax.Array  # [] int32
    clipped: jax.Array  # [] tokens
    kl: jax.Array  # [] nats
    left_out: jax.Array  # [] tokens
    entropy: jax.Array  # [] nats


def objective_of(grpo: GrpoConfig) -> Objective:
    """The objective of that name, with what the configuration sets itself."""
    own = {name: getattr(grpo, name) for name in ("clip_low", "clip_high", "kl_weight")}
    base = vars(OBJECTIVES[grpo.objective])
    return Objective(**base | {name: value for name, value in own.items() if value is not None})


def answer_targets(mask: jax.Array, batch: Batch, depth: int) -> list[tuple[jax.Array, jax.Array]]:
    """For each depth of multi-token prediction the tokens that it predicts, [B, T], and which of them are answers'."""
    found = []
    for k in range(1, depth + 1):
        tokens, segment_ids = look_ahead(batch, k + 1)
        found.append((tokens, (segment_ids > 0) & (shift_left(mask.astype(jnp.int32), k) > 0)))
    return found


def count(rollout: Rollout, depth: int) -> Counts:
    """Of one micro-batch; to be summed."""
    valid = [jnp.sum(v, dtype=jnp.float32) for _, v in answer_targets(rollout.mask, rollout.batch, depth)]
    rows = jnp.sum(jnp.any(rollout.batch.segment_ids > 0, axis=1), dtype=jnp.float32)
    return Counts(rows, jnp.stack(valid) if valid else jnp.zeros((0,), jnp.float32))


def policy_gradients(
    model: DeepSeek,
    router_bias: RouterBias,
    rollout: Rollout,
    counts: Counts,
    mtp_weight: Float[Array, ""],
    config: Config,
) -> tuple[DeepSeek, Parts, Float[Array, "B T"]]:
    """A micro-batch's share of the gradient of the loss, its parts, and the log-probability of each next token.

    Multi-token prediction learns what the policy says; its gradient stops at the trunk, the embedding and the head.
    """
    objective = objective_of(config.grpo)
    batch, mask = rollout.batch, rollout.mask
    targets = [jnp.maximum(n, 1) for n in counts.targets]

    def loss(model):
        model = cast_weights(model, config.compute.precision)
        out = model(batch, router_bias, config.compute, config.balance, rollout.experts, detach_mtp=True)
        head = model.head[...]
        logp, entropy = token_logprobs(
            out.hidden, head, shift_left(batch.tokens, 1), jnp.float32(config.grpo.temperature)
        )
        policy, measured = policy_loss(
            logp, rollout.old, rollout.reference, rollout.sampler, rollout.advantage, mask, rollout.weights, objective
        )
        said = answer_targets(mask, batch, len(out.mtp_hidden))
        nats = [
            cross_entropy(hidden, jax.lax.stop_gradient(head), tokens, valid) / n
            for hidden, (tokens, valid), n in zip(out.mtp_hidden, said, targets)
        ]
        mtp = jnp.stack(nats) if nats else jnp.zeros((0,), jnp.float32)
        balance = sum(out.balance.values(), jnp.zeros((), jnp.float32)) / jnp.maximum(counts.rows, 1)
        total = policy + mtp_weight * jnp.sum(mtp) / max(len(nats), 1) + balance
        parts = Parts(
            policy,
            mtp,
            balance,
            out.load,
            out.overflow,
            *measured,
            entropy=jnp.sum(jnp.where(mask, entropy, 0)),
        )
        return total, (parts, logp)

    grads, (parts, logp) = jax.grad(loss, has_aux=True)(model)
    return grads, parts, logp


def add(one: tuple[DeepSeek, Parts], other: tuple[DeepSeek, Parts]) -> tuple[DeepSeek, Parts]:
    """Gradients and parts of two micro-batches."""
    return jax.tree.map(jnp.add, one, other)


def apply(
    state: PolicyState, grads: DeepSeek, parts: Parts, knobs: dict[str, jax.Array], config: Config
) -> tuple[PolicyState, dict[str, jax.Array]]:
    """The state a step further, and what the step says of itself.

    NaN or Inf leave everything as it was but the counts of skipped steps; rows without room on their experts' devices
    leave everything, unless compute.on_overflow=drop.
    """
    norm = optax.tree.norm(grads)
    taken = (parts.overflow == 0) | (config.compute.on_overflow == "drop")
    good = jnp.isfinite(norm) & jnp.isfinite(parts.loss + jnp.sum(parts.mtp_loss) + parts.balance)
    new = updated(state, grads, norm, parts.load, knobs, config)
    state = jax.tree.map(lambda n, o: jnp.where(good & taken, n, o), new, state).replace(
        step=state.step + taken,
        skipped=state.skipped + (taken & ~good),
        skipped_in_a_row=jnp.where(taken, jnp.where(good, 0, state.skipped_in_a_row + 1), state.skipped_in_a_row),
    )
    max_vio = jnp.concatenate([max_violation(parts.load.moe), max_violation(parts.load.mtp)])
    said = {"grad_norm": norm, "max_vio": max_vio, "skipped": state.skipped, "skipped_in_a_row": state.skipped_in_a_row}
    return state, said


def score(
    model: DeepSeek,
    router_bias: RouterBias,
    batch: Batch,
    temperature: Float[Array, ""],
    experts: Int[Array, "L B T K"] | None,
    compute: ComputeConfig,
) -> Float[Array, "B T"]:
    """The log-probability of each next token; at the place before it. No loads of experts but fit."""
    model = cast_weights(model, compute.precision)
    out = model(batch, router_bias, replace(compute, expert_buffer=None), replay=experts)
    return token_logprobs(out.hidden, model.head[...], shift_left(batch.tokens, 1), temperature)[0]


class Programs:
    """The compiled functions of one configuration."""

    def __init__(self, config: Config):
        self.gradients = jax.jit(functools.partial(policy_gradients, config=config))
        self.count = jax.jit(count, static_argnums=1)
        self.add = jax.jit(add, donate_argnums=(0, 1))
        self.apply = jax.jit(functools.partial(apply, config=config), donate_argnums=0)
        self.score = jax.jit(functools.partial(score, compute=config.compute))
