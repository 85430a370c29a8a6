"""What every step of policy optimisation must be, said without the code that takes it: referees for the tests, and for
the table of known mistakes.
"""

import functools

import jax
import jax.numpy as jnp
import models
import numpy as np

from dsjax.config import BalanceConfig, Config, GrpoConfig, replace
from dsjax.posttrain import policy, rows
from dsjax.posttrain.rollouts import Answer, Group
from dsjax.posttrain.tasks import Problem
from dsjax.state import Rollout, RouterBias

TEMPERATURE, LONGEST = 0.7, 8
OBJECTIVE = "r1"


def config(**changes) -> Config:
    """Eight answers of two groups, with a clip that is felt and a distance that is too."""
    grpo = dict(
        group_size=4, max_tokens=LONGEST, temperature=TEMPERATURE, clip_low=0.1, clip_high=0.15, kl_weight=0.3,
        objective=OBJECTIVE, task="test",
    )  # fmt: skip
    for name in list(changes):
        if name in GrpoConfig.__dataclass_fields__:
            grpo[name] = changes.pop(name)
    return replace(models.config(models.v3(), batch_size=8, **changes), grpo=GrpoConfig(**grpo))


def groups(seed: int = 0, n: int = 2) -> list[Group]:
    """Prompts of different lengths, and answers of 1 to LONGEST tokens by a policy near the model's."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(n):
        prompt = rng.integers(1, models.VOCAB, 3 + 2 * number).tolist()
        group = Group(number, 0, Problem("?"), prompt, [])
        for _ in range(4):
            tokens = rng.integers(1, models.VOCAB, rng.integers(1, LONGEST + 1)).tolist()
            logprobs = rng.normal(-4, 0.4, len(tokens)).tolist()
            experts = [rng.permuted(np.tile(np.arange(8), (2, 1)), axis=1)[:, :2].astype(np.int32) for _ in tokens]
            unknown = np.full((2, len(prompt), 2), -1, np.int32)
            group.answers.append(Answer(tokens, logprobs, [0] * len(tokens), experts, unknown, "stop"))
        made.append(group)
    return made


def rewards(seed: int = 1, n: int = 2) -> np.ndarray:
    """Of groups that are not of one mean."""
    return np.random.default_rng(seed).integers(0, 3, (n, 4)) + 2.0 * np.arange(n)[:, None] + np.eye(n, 4)


def micros(cfg: Config, seed: int = 0, mesh=None) -> list[Rollout]:
    """The micro-batches of a step, with a reference and an old policy unlike the sampler."""
    mesh = mesh or jax.sharding.get_mesh()
    of = groups(seed)
    advantage = rows.group_advantages(rewards(), cfg.grpo)
    made = []
    for arrays in rows.rollouts(of, advantage, 0, cfg):
        shape = arrays["sampler"].shape
        # by what a row holds, so that it is the same whatever micro-batch it is in
        noise = np.stack(
            [np.random.default_rng(t.tolist()).normal(0, 0.2, (2, shape[1])) for t in arrays["tokens"]], axis=1
        )
        rollout = rows.on_mesh(arrays, mesh)
        put = lambda a, like=rollout.sampler: jax.device_put(np.float32(a), like.sharding)  # noqa: E731
        old, reference = (np.asarray(rollout.sampler) + noise[i] for i in range(2))
        made.append(rollout.replace(old=put(old), reference=put(reference)))
    return made


def step(cfg: Config, model, bias: RouterBias, given: list[Rollout]):
    """Gradients and parts of a step, summed over its micro-batches."""
    depth = cfg.model.num_nextn_predict_layers
    counts = jax.tree.map(lambda *n: sum(n), *(policy.count(m, depth) for m in given))
    gradients = jax.jit(functools.partial(policy.policy_gradients, config=cfg))
    found = [gradients(model, bias, m, counts, jnp.float32(0.3))[:2] for m in given]
    return functools.reduce(policy.add, found)


def by_hand(cfg: Config, model, bias: RouterBias, given: Rollout, lengths: list[tuple[int, int]]):
    """The loss of all answers in one micro-batch as the papers write it, token by token; and its gradient by JAX.

    lengths: of each row's prompt and answer. All logits at once, a loop over answers and one over tokens.
    """
    grpo, batch = cfg.grpo, given.batch
    tokens, old, reference = (np.asarray(a) for a in (batch.tokens, given.old, given.reference))
    rewarded = {tuple(t[: p + n]): r for (t, p, n), r in zip(_answers(), rewards().ravel())}
    of_group = {}
    for i, (p, n) in enumerate(lengths):
        key = tuple(tokens[i, : p + n].tolist())
        of_group[i] = (p, rewarded[key])  # prompts of the two groups differ in length

    def gain(i):
        mine = [r for p, r in of_group.values() if p == of_group[i][0]]
        return (of_group[i][1] - np.mean(mine)) / np.std(mine)

    def loss(model):
        out = model(batch, bias, cfg.compute, cfg.balance, given.experts)
        logp = jax.reshard(jax.nn.log_softmax(model.logits(out.hidden) / grpo.temperature, axis=-1), jax.P())
        total = 0.0
        for i, (p, n) in enumerate(lengths):
            for t in range(p, p + n):
                here = logp[i, t - 1, batch.tokens[i, t]]
                ratio = jnp.exp(here - old[i, t - 1])
                bounded = jnp.minimum(jnp.maximum(ratio, 1 - grpo.clip_low), 1 + grpo.clip_high)
                value = jnp.minimum(ratio * gain(i), bounded * gain(i))
                r = jnp.exp(reference[i, t - 1] - here)
                total += (value - grpo.kl_weight * (r - jnp.log(r) - 1)) / n / len(lengths)
        return -total

    return jax.jit(jax.value_and_grad(loss))(model)


def _answers():
    for group in groups():
        for answer in group.answers:
            yield [*group.prompt, *answer.tokens], len(group.prompt), len(answer.tokens)


def check_the_step_is_the_equation() -> None:
    """Loss and gradient of the trunk, at a temperature, with prompts, padding, a clip and a reference."""
    cfg = config(balance=BalanceConfig(), replay=False)
    model, bias = models.draw(cfg.model)
    (given,) = micros(cfg)
    known = {tuple(t): (p, n) for t, p, n in _answers()}
    filled = np.asarray(given.batch.segment_ids).sum(axis=1)
    lengths = [known[tuple(t[:n].tolist())] for t, n in zip(np.asarray(given.batch.tokens), filled)]
    expected, grad = by_hand(cfg, model, bias, given, lengths)
    got, parts = step(cfg, model, bias, [given])
    np.testing.assert_allclose(parts.loss, expected, rtol=2e-5)
    got, grad = models.named_leaves(got), models.named_leaves(grad)
    for name, leaf in grad.items():
        if not name.startswith("mtp"):
            np.testing.assert_allclose(got[name], leaf, rtol=2e-3, atol=2e-6, err_msg=name)


def check_micro_batches_and_devices_add_up() -> None:
    """Two micro-batches, and four devices, take the step of one."""
    from sharding.mesh import make_mesh

    found = []
    for accumulate, shape in ((1, {}), (2, {}), (1, dict(data=2, fsdp=2))):
        mesh = make_mesh(jax.devices()[: 4 if shape else 1], **shape)
        cfg = config(accumulate=accumulate)
        with jax.set_mesh(mesh):
            model, bias = models.draw(cfg.model)
            grads, parts = step(cfg, model, bias, micros(cfg, mesh=mesh))
            found.append((models.named_leaves(grads), float(parts.loss), np.asarray(parts.mtp_loss)))
    for grads, loss, mtp in found[1:]:
        np.testing.assert_allclose(loss, found[0][1], rtol=1e-4)
        np.testing.assert_allclose(mtp, found[0][2], rtol=1e-4)
        for name, leaf in found[0][0].items():
            np.testing.assert_allclose(grads[name], leaf, rtol=5e-3, atol=2e-6, err_msg=name)


def check_advantages_are_of_the_group() -> None:
    """The mean of every group's advantages is 0, whatever the other groups got."""
    cfg = config()
    found = rows.group_advantages(rewards(), cfg.grpo)
    np.testing.assert_allclose(found.mean(axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(found.std(axis=1), 1, rtol=1e-5)


def check_replay_reaches_the_backward_pass() -> None:
    """With experts given that the router would not choose, rematerialised gradients are those without."""
    found = []
    for remat in ("none", "full", "deepseek"):
        compute = replace(models.COMPUTE, remat=remat)
        cfg = config(compute=compute)
        model, bias = models.draw(cfg.model)
        grads, _ = step(cfg, model, bias, micros(cfg))
        found.append(models.named_leaves(grads))
    for grads in found[1:]:
        for name, leaf in found[0].items():
            np.testing.assert_allclose(grads[name], leaf, rtol=1e-3, atol=1e-6, err_msg=name)
