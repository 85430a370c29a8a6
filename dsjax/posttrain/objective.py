"""What policy optimisation maximises, as data: GRPO and its kin are entries of one table.

GRPO: DeepSeekMath (arXiv:2402.03300), as token-level ratios; Dr. GRPO: arXiv:2503.20783; DAPO: arXiv:2503.14476; GSPO:
arXiv:2507.18071; V3.2: arXiv:2512.02556, section 3.1 (reference section 7.5).
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


@dataclass(frozen=True)
class Objective:
    """Token t of answer i gets min(ratio A_i, clip(ratio) A_i) - kl_weight D, weighted by `token_weights`."""

    clip_low: float = 0.2  # ratios below 1 - clip_low gain nothing
    clip_high: float = 0.2  # nor do those above 1 + clip_high
    ratio: Literal["token", "sequence"] = "token"  # sequence: the geometric mean of an answer's tokens
    kl_weight: float = 0.0  # of the distance to the reference policy
    kl: Literal["k3", "unbiased"] = "k3"  # unbiased: k3 times the ratio, whose gradient is that of the distance
    scale: bool = True  # advantages over the standard deviation of their group
    normalise: Literal["sequence", "token", "constant"] = "sequence"
    off_policy: float | None = None  # answers of negative advantage further than this from the policy are left out
    most_weight: float | None = None  # importance weights of an older or inexact sampler, cut off here; None: none


OBJECTIVES: dict[str, Objective] = {
    "grpo": Objective(kl_weight=0.04),
    "r1": Objective(clip_low=10.0, clip_high=10.0, kl_weight=0.001),
    "dr_grpo": Objective(scale=False, normalise="constant"),
    "dapo": Objective(clip_high=0.28, normalise="token"),
    "gspo": Objective(clip_low=3e-4, clip_high=4e-4, ratio="sequence"),
    "v3_2": Objective(kl_weight=0.001, kl="unbiased", scale=False, off_policy=1.0, most_weight=2.0),
}


class Measured(NamedTuple):
    """Sums over the tokens of answers."""

    clipped: jax.Array  # [] tokens whose ratio brings no gradient
    kl: jax.Array  # [] k3 to the reference, nats
    left_out: jax.Array  # [] tokens of answers that are too far from the policy


def advantages(rewards: Float[Array, "N G"], scale: bool = True) -> Float[Array, "N G"]:
    """Each answer's reward less the mean of its group, over their standard deviation; 0 where all are alike."""
    # A mean of equal numbers is not always that number: what rounding leaves must not be divided by itself.
    alike = jnp.max(rewards, axis=1, keepdims=True) == jnp.min(rewards, axis=1, keepdims=True)
    centred = jnp.where(alike, 0, rewards - jnp.mean(rewards, axis=1, keepdims=True))
    if not scale:
        return centred
    return centred / jnp.where(alike, 1, jnp.std(rewards, axis=1, keepdims=True))


def token_weights(mask: Bool[Array, "B T"], normalise: str, longest: int | None = None) -> Float[Array, "B T"]:
    """What each token counts, for the whole batch of a step, whatever devices and micro-batches it is cut into.

    mask: the tokens of answers, not of prompts or padding. "sequence": answers count alike, and their tokens share it
    (GRPO); "token": all tokens count alike (DAPO); "constant": a token counts 1 / (answers x longest) (Dr. GRPO).
    Raises ValueError for another name, or without `longest`.
    """
    n = len(mask)
    if normalise == "sequence":
        return mask / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1) / n
    if normalise == "token":
        return mask / jnp.maximum(jnp.sum(mask), 1)
    if normalise == "constant" and longest:
        return mask / (n * longest)
    raise ValueError(f"normalise={normalise!r}: expected sequence, token, or constant with longest")


def policy_loss(
    logp: Float[Array, "B T"],
    old: Float[Array, "B T"],
    reference: Float[Array, "B T"] | None,
    sampler: Float[Array, "B T"] | None,
    advantage: Float[Array, "B"],
    mask: Bool[Array, "B T"],
    weights: Float[Array, "B T"],
    objective: Objective,
) -> tuple[Float[Array, ""], Measured]:
    """The loss of some rows: a sum over their tokens by `weights`, to be added up over micro-batches; nats.

    logp: of each token under the policy that learns, of the tempered distribution it was sampled from; old: under the
    policy at the step's begin; reference: under the one that the policy is kept near to; sampler: as the sampler said.
    Values where mask is False do not matter. Gradients go through logp alone.
    """
    old, reference, sampler = (None if a is None else jax.lax.stop_gradient(a) for a in (old, reference, sampler))
    apart = jnp.where(mask, logp - old, 0)
    n_tokens = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
    ratio = of_token = jnp.exp(apart)
    if objective.ratio == "sequence":
        ratio = jnp.broadcast_to(jnp.exp(jnp.sum(apart, axis=1, keepdims=True) / n_tokens), apart.shape)
    gain = advantage[:, None]
    clipped = jnp.clip(ratio, 1 - objective.clip_low, 1 + objective.clip_high)
    value = jnp.minimum(ratio * gain, clipped * gain)
    kept = mask
    if objective.off_policy is not None:
        since = old if sampler is None else sampler
        distance = jnp.sum(jnp.where(mask, since - jax.lax.stop_gradient(logp), 0), axis=1, keepdims=True) / n_tokens
        kept = mask & ~((gain < 0) & (distance > objective.off_policy))
        value = jnp.where(kept, value, 0)
    if objective.most_weight is not None and sampler is not None:
        value = value * jnp.minimum(jnp.exp(jnp.where(mask, old - sampler, 0)), objective.most_weight)
    k3 = jnp.zeros_like(logp)
    if reference is not None:
        further = jnp.where(mask, reference - logp, 0)
        k3 = jnp.exp(further) - further - 1
        if objective.kl_weight:
            penalty = of_token * k3 if objective.kl == "unbiased" else k3
            value = value - objective.kl_weight * penalty
    loss = -jnp.sum(jnp.where(mask, weights * value, 0))
    of_answers = lambda a: jnp.sum(jnp.where(mask, a, 0.0))  # noqa: E731
    return loss, Measured(*map(of_answers, (clipped * gain < ratio * gain, k3, ~kept)))
