"""Known mistakes of policy optimisation, each made in turn, and whether the checks see it.

    python tests/posttrain/mistakes.py

Exits with 1 if a mistake passes.
"""

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import checks
import jax
import jax.numpy as jnp
import numpy as np

from dsjax.posttrain import objective, policy, rows
from dsjax.train import loss
from sharding.mesh import make_mesh
from sharding.rules import constrain


@dataclasses.dataclass(frozen=True)
class Mistake:
    where: object  # module
    name: str  # of the function that `wrong` replaces
    wrong: Callable
    check: Callable  # that must see it


def _shifted(hidden, head, targets, temperature, right=loss.token_logprobs):
    return right(
        hidden, head, constrain(jnp.roll(constrain(targets, "batch", None), 1, axis=1), "batch", "seq"), temperature
    )


def _untempered(hidden, head, targets, temperature, right=loss.token_logprobs):
    return right(hidden, head, targets, jnp.ones_like(temperature))


def _with_prompts(one, learned, counted, length, version, config, right=rows._row):
    row = right(one, learned, counted, length, version, config)
    before = len(one[0].prompt) - 1
    row["mask"][:before] = True
    row["weights"][:before] = counted[0]
    return row


def _with_padding(one, learned, counted, length, version, config, right=rows._row):
    row = right(one, learned, counted, length, version, config)
    row["mask"][:] |= row["segment_ids"] == 0
    row["weights"][row["segment_ids"] == 0] = counted[0]
    return row


def _per_micro_batch(groups, advantage, version, config, right=rows.rollouts):
    for arrays in right(groups, advantage, version, config):
        arrays["weights"] = np.float32(arrays["mask"] / arrays["mask"].sum(axis=1, keepdims=True) / len(arrays["mask"]))
        yield arrays


def _loss_with(change: Callable, right=objective.policy_loss):
    def wrong(logp, old, reference, sampler, advantage, mask, weights, o):
        return right(*change(logp, old, reference, sampler, advantage, mask, weights, o))

    return wrong


def _kl_sign(*given):
    *rest, o = given
    return *rest, dataclasses.replace(o, kl_weight=-o.kl_weight)


def _clip_of_the_wrong_side(logp, old, reference, sampler, advantage, mask, weights, o, right=objective.policy_loss):
    """The larger of the two, which is the smaller one of the negative advantage."""
    plain = dataclasses.replace(o, kl_weight=0.0)
    clipped, measured = right(logp, old, None, sampler, -advantage, mask, weights, plain)
    distance, _ = right(logp, old, reference, sampler, 0 * advantage, mask, weights, o)
    return distance - clipped, measured


def _over_the_batch(rewards, scale=True):
    return (rewards - jnp.mean(rewards)) / jnp.std(rewards)


def _chosen_again_in_the_backward_pass(block, policy_name):
    """Rematerialisation that runs the router anew, without the experts that were given."""
    if policy_name == "none":
        return block

    def run(*given):
        *rest, replay = given
        if len(given) < 5 or replay is None:
            return block(*given)
        return jax.tree.map(lambda y, again: again + jax.lax.stop_gradient(y - again), block(*given), block(*rest))

    return run


def _remat_module():
    from dsjax.model import transformer

    return transformer


step, sums = checks.check_the_step_is_the_equation, checks.check_micro_batches_and_devices_add_up
MISTAKES: dict[str, Mistake] = {
    "log-probabilities shifted by a token": Mistake(policy, "token_logprobs", _shifted, step),
    "log-probabilities without the temperature": Mistake(policy, "token_logprobs", _untempered, step),
    "prompt tokens in the loss": Mistake(rows, "_row", _with_prompts, step),
    "padding in the loss": Mistake(rows, "_row", _with_padding, step),
    "a normaliser of each micro-batch or device": Mistake(rows, "rollouts", _per_micro_batch, sums),
    "the sign of the distance": Mistake(policy, "policy_loss", _loss_with(_kl_sign), step),
    "the clipped side": Mistake(policy, "policy_loss", _clip_of_the_wrong_side, step),
    "advantage over the batch": Mistake(rows, "advantages", _over_the_batch, checks.check_advantages_are_of_the_group),
    "no replay in rematerialisation": Mistake(
        _remat_module(), "remat", _chosen_again_in_the_backward_pass, checks.check_replay_reaches_the_backward_pass
    ),
}


def run(mistakes: dict[str, Mistake]) -> list[str]:
    """Makes each in turn; those that no check saw."""
    passed = []
    for name, mistake in mistakes.items():
        with mock.patch.object(mistake.where, mistake.name, mistake.wrong), jax.set_mesh(make_mesh(jax.devices()[:1])):
            try:
                mistake.check()
            except AssertionError as error:
                why = " ".join(str(error).split())[:80]
                print(f"{name}: seen by {mistake.check.__name__} ({why})")
            else:
                print(f"{name}: NOT SEEN by {mistake.check.__name__}")
                passed.append(name)
    return passed


if __name__ == "__main__":
    sys.exit(bool(run(MISTAKES)))
