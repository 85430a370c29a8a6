"""Groups of answers as the arrays of a training step: one answer a row, rows of like lengths together."""

from collections.abc import Iterator

import jax
import numpy as np

from dsjax.config import Config, GrpoConfig
from dsjax.posttrain.objective import advantages, token_weights
from dsjax.posttrain.policy import objective_of
from dsjax.posttrain.rollouts import Answer, Group
from dsjax.state import Batch, Rollout
from sharding.rules import spec

SHORTEST = 32  # tokens of a row


def length_penalty(n_tokens: int, max_tokens: int, buffer: int) -> float:
    """0 up to `buffer` tokens before the most, then down to -1 there (DAPO, arXiv:2503.14476, eq. 13)."""
    return min(0.0, (max_tokens - buffer - n_tokens) / buffer)


def paid(group: Group, rewards: np.ndarray, grpo: GrpoConfig) -> np.ndarray:
    """[G] rewards, after what answers pay for their length."""
    if grpo.overlong != "penalty":
        return rewards
    return rewards + [length_penalty(len(a.tokens), grpo.max_tokens, grpo.overlong_buffer) for a in group.answers]


def group_advantages(rewards: np.ndarray, grpo: GrpoConfig) -> np.ndarray:
    """[N, G] float32 from rewards [N, G]."""
    return np.asarray(advantages(np.asarray(rewards, np.float32), objective_of(grpo).scale))


def rollouts(
    groups: list[Group], advantage: np.ndarray, version: int, config: Config
) -> Iterator[dict[str, np.ndarray]]:
    """The micro-batches of a step, [B, T] each, from groups whose answers are batch_size rows.

    Rows are sorted by length, so that a micro-batch is little longer than its rows. Weights are those of the whole
    step. Arrays by the names of `Rollout`, and tokens, segment_ids and positions.
    """
    grpo = config.grpo
    answers = [(g, a, float(v)) for g, row in zip(groups, advantage) for a, v in zip(g.answers, row)]
    learned = [0 if grpo.overlong == "mask" and a.reason == "length" else len(a.tokens) for _, a, _ in answers]
    mask = np.arange(grpo.max_tokens) < np.array(learned)[:, None]  # one width: one compilation
    counted = np.asarray(token_weights(mask, objective_of(grpo).normalise, grpo.max_tokens))
    lengths = np.array([len(g.prompt) + len(a.tokens) for g, a, _ in answers])
    order = np.argsort(lengths, kind="stable")
    for rows in np.split(order, config.accumulate):
        # Where bits are compared, rows have the length that they were sampled in.
        length = config.seq_len if grpo.exact else row_length(int(lengths[rows].max()), config.seq_len)
        made = [_row(answers[i], learned[i], counted[i], length, version, config) for i in rows]
        yield {name: np.stack([row[name] for row in made], axis=name == "experts") for name in made[0]}


def row_length(n: int, longest: int) -> int:
    """The power of two from SHORTEST on that holds n tokens, and at most the longest: few sizes, few compilations."""
    return min(longest, max(SHORTEST, 1 << (n - 1).bit_length()))


def _row(
    one: tuple[Group, Answer, float], learned: int, counted: np.ndarray, length: int, version: int, config: Config
):
    group, answer, advantage = one
    prompt, n = len(group.prompt), len(answer.tokens)
    row = {name: np.zeros(length, np.int32) for name in ("tokens", "segment_ids", "positions")}
    row["tokens"][: prompt + n] = [*group.prompt, *answer.tokens]
    row["segment_ids"][: prompt + n] = 1
    row["positions"][: prompt + n] = np.arange(prompt + n)
    row |= {name: np.zeros(length, np.float32) for name in ("sampler", "weights")}
    row |= {name: np.zeros(length, bool) for name in ("mask", "fresh")}
    places = slice(prompt - 1, prompt - 1 + n)
    row["sampler"][places] = answer.logprobs
    row["fresh"][places] = np.array(answer.versions) == version
    row["mask"][prompt - 1 : prompt - 1 + learned] = True
    row["weights"][prompt - 1 : prompt - 1 + learned] = counted[:learned]
    row["advantage"] = np.float32(advantage)
    if config.grpo.replay and not config.grpo.exact:
        experts = np.full((config.model.num_moe_layers, length, config.model.num_experts_per_tok), -1, np.int32)
        experts[:, :prompt] = answer.prompt_experts
        experts[:, places] = np.stack(answer.experts, axis=1)
        row["experts"] = experts
    return row


def on_mesh(arrays: dict[str, np.ndarray], mesh) -> Rollout:
    """The rollout on the devices; `old` is the sampler's until it is replaced, and there is no reference yet."""
    named = {"experts": (None, "batch", "seq", None), "advantage": ("batch",)}

    def place(name: str) -> jax.Array | None:
        if name not in arrays:
            return None
        return jax.device_put(arrays[name], jax.NamedSharding(mesh, spec(*named.get(name, ("batch", "seq")))))

    batch = Batch(*map(place, ("tokens", "segment_ids", "positions")))
    given = {name: place(name) for name in ("mask", "sampler", "advantage", "weights", "fresh", "experts")}
    return Rollout(batch=batch, old=given["sampler"], reference=None, **given)
