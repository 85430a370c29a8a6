"""What the engine runs on the devices: a chunk of prompts, and one step of all rows, with the next drafts.

A step reads each row's last token and the tokens drafted behind it, and samples at each of these places as if nothing
had been drafted. Since the noise of a place is given (dsjax.infer.sampling), a draft is right exactly if it is the
token that is sampled there: so the text is the same with drafts and without, whatever the temperature, and the draft,
sampled with the same noise from its own distribution, is often that token.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsjax.config import ComputeConfig
from dsjax.infer.sampling import logprobs_of, sample
from dsjax.model.transformer import Extended, place_of
from dsjax.state import Flat, KVCache, LatentCache, Rows, Stepped, Weights
from sharding.rules import constrain


@functools.partial(jax.jit, static_argnames=("compute", "n_draft"), donate_argnames="pages")
def step(
    weights: Flat,
    pages: LatentCache | KVCache,
    rows: Rows,
    drafted: Int[Array, "B"],
    *,
    compute: ComputeConfig,
    n_draft: int,
) -> tuple[LatentCache | KVCache, Stepped]:
    """rows.tokens: [B, 1 + drafts of the last step]; drafted: how many of these count, by row. n_draft: of the next."""
    weights, rows, drafted = weights.tree, _lay(rows), constrain(drafted, "batch")
    out = _extend(weights, pages, rows, compute)
    logits = _logits(weights, out.hidden, rows)
    n = rows.tokens.shape[1]
    places = rows.length[:, None] + 1 + jnp.arange(n)
    tokens = constrain(sample(logits, rows.sampling, places), "batch", None)
    drafts = rows.tokens[:, 1:]
    right = (tokens[:, :-1] == drafts) & (jnp.arange(n - 1) < drafted[:, None])
    accepted = jnp.sum(jnp.cumprod(right, axis=1), axis=1, dtype=jnp.int32)
    logprobs = logprobs_of(logits, rows.sampling, tokens, rows.want_logprobs)
    pages, next_drafts = _draft(weights, out, rows, tokens, accepted, compute, n_draft)
    return pages, Stepped(tokens, accepted, next_drafts, logprobs, out.indices)


@functools.partial(jax.jit, static_argnames=("compute", "n_draft", "want_prompt"), donate_argnames="pages")
def prefill(
    weights: Flat,
    pages: LatentCache | KVCache,
    rows: Rows,
    following: Int[Array, "B T"],
    n_new: Int[Array, "B"],
    *,
    compute: ComputeConfig,
    n_draft: int,
    want_prompt: bool,
) -> tuple[LatentCache | KVCache, Stepped]:
    """A chunk of each row's prompt: the first n_new of rows.tokens.

    following: the token behind each place, -1 behind the prompt's last, where one is sampled. Stepped.tokens is
    [B, 1]: that behind the chunk. want_prompt: logprobs are of all places, of `following`, and of the sampled one at
    -1; else of that alone.
    """
    weights, rows = weights.tree, _lay(rows)
    following, n_new = constrain(following, "batch", None), constrain(n_new, "batch")
    out = _extend(weights, pages, rows, compute)
    last = jnp.maximum(n_new, 1) - 1
    hidden = out.hidden if want_prompt else place_of(out.hidden, last)
    logits = _logits(weights, hidden, rows)
    tokens = sample(place_of(logits, last) if want_prompt else logits, rows.sampling, (rows.length + n_new)[:, None])
    tokens = constrain(tokens, "batch", None)
    behind = jnp.where(following < 0, tokens, following)
    logprobs = logprobs_of(logits, rows.sampling, behind if want_prompt else tokens, rows.want_logprobs)
    pages, drafts = _draft(weights, out, rows, behind, last, compute, n_draft)
    return pages, Stepped(tokens, jnp.zeros_like(n_new), drafts, logprobs, out.indices)


def _lay(rows: Rows) -> Rows:
    """Each device's own rows, of what the host gave to all."""
    return jax.tree.map(lambda a: constrain(a, "batch", *(None,) * (a.ndim - 1)) if a.ndim else a, rows)


def _extend(weights: Weights, pages, rows: Rows, compute: ComputeConfig) -> Extended:
    return weights.model.extend(
        rows.tokens, pages, rows.table, rows.length, weights.router_bias, compute, weights.layers, weights.replicas
    )


def _logits(weights: Weights, hidden: Float[Array, "B T D"], rows: Rows) -> Float[Array, "B T V"]:
    logits = constrain(weights.model.logits(hidden), "batch", None, None)
    factor = rows.factor[:, None]
    return jnp.where(logits > 0, logits / factor, logits * factor) + rows.added[:, None]


def _draft(weights: Weights, out: Extended, rows: Rows, tokens, last, compute, n_draft):
    """The module's pages filled up to place `last` of this step's, and the drafts behind the token there.

    tokens: [B, T], the one behind each place. Drafts behind the first come from the module's own hidden state, and what
    it keeps of them is written over in the next step.
    """
    pages, length, recycled, drafts = out.pages, rows.length, out.recycled, []
    for _ in range(n_draft):
        d = weights.model.draft(
            tokens, recycled, pages, rows.table, length, last, weights.router_bias, compute, weights.layers
        )
        pages, recycled, length, last = d.pages, d.recycled, length + last + 1, jnp.zeros_like(last)
        tokens = sample(_logits(weights, d.hidden, rows), rows.sampling, (length + 1)[:, None])
        tokens = constrain(tokens, "batch", None)
        drafts.append(tokens)
    none = jnp.zeros_like(rows.tokens[:, :0])
    return pages, jnp.concatenate([none, *drafts], axis=1)
