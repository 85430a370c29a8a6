"""From logits to tokens, on the device: temperature, top-k, top-p, min-p, and noise of seed and place alone.

A token is the likeliest after Gumbel noise is added to its logits, which draws from their softmax. The noise is a
function of a request's seed and of the token's place in its text: the same request gives the same tokens, whatever else
is computed with it and however many tokens at once.
"""

import jax
import jax.numpy as jnp
from jax import P, lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from dsjax.state import Logprobs, Sampling
from sharding.rules import constrain, spec

TOP_LOGPROBS = 20  # the most that OpenAI's interface gives


def sample(logits: Float[Array, "B T V"], sampling: Sampling, place: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """One token for each place of its row's text."""
    logits, place = constrain(logits, "batch", None, None), constrain(place, "batch", None)
    sampling = jax.tree.map(lambda a: constrain(a, "batch"), sampling)
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw():
        warm = jnp.where(tempered(logits, sampling) >= _floor(logits, sampling), tempered(logits, sampling), -jnp.inf)
        drawn = jnp.argmax(warm + _noise(sampling.seed, place, logits.shape[-1]), axis=-1).astype(jnp.int32)
        return jnp.where(sampling.temperature[:, None] > 0, drawn, likeliest)

    return lax.cond(jnp.any(sampling.temperature > 0), draw, lambda: likeliest)


def tempered(logits: Float[Array, "B T V"], sampling: Sampling) -> Float[Array, "B T V"]:
    """Logits over the temperature; over 1 where that is 0."""
    return logits / jnp.where(sampling.temperature > 0, sampling.temperature, 1)[:, None, None]


def logprobs_of(
    logits: Float[Array, "B T V"], sampling: Sampling, tokens: Int[Array, "B T"], wanted: Bool[Array, ""]
) -> Logprobs:
    """Of the tokens, and of the likeliest ones; zeros where they are not wanted."""
    n = min(TOP_LOGPROBS, logits.shape[-1])
    more = ((0, 0), (0, 0), (0, TOP_LOGPROBS - n))
    layout = spec("batch", None, None)

    def local(logits, temperature, tokens):
        logp = jax.nn.log_softmax(logits / jnp.where(temperature > 0, temperature, 1)[:, None, None], axis=-1)
        chosen = jnp.take_along_axis(logp, tokens[..., None], axis=-1)[..., 0]
        top, ids = lax.top_k(logp, n)
        return Logprobs(chosen, jnp.pad(top, more, constant_values=-jnp.inf), jnp.pad(ids.astype(jnp.int32), more))

    def compute(logits, temperature, tokens, wanted):
        like = jax.eval_shape(local, logits, temperature, tokens)
        nothing = lambda *_: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)  # noqa: E731
        return lax.cond(wanted, local, nothing, logits, temperature, tokens)

    return jax.shard_map(
        compute,
        in_specs=(layout, spec("batch"), spec("batch", None), P()),
        out_specs=Logprobs(spec("batch", None), layout, layout),
        check_vma=False,
    )(
        constrain(logits, "batch", None, None),
        constrain(sampling.temperature, "batch"),
        constrain(tokens, "batch", None),
        wanted,
    )


def _floor(logits: Float[Array, "B T V"], sampling: Sampling) -> Float[Array, "B T 1"]:
    """The lowest tempered logit that may be drawn."""
    warm = tempered(logits, sampling)
    of_row = {name: getattr(sampling, name)[:, None, None] for name in ("top_k", "top_p", "min_p")}

    def filtered():
        largest = jnp.max(warm, axis=-1, keepdims=True)
        p = jnp.exp(warm - largest)  # over that of the likeliest, so that the order is the logits'
        k = jnp.where(of_row["top_k"] > 0, of_row["top_k"], p.shape[-1])
        by_k = _highest(lambda floor: jnp.sum(p >= floor, axis=-1, keepdims=True) >= k, p)
        mass = jnp.sum(jnp.where(p >= by_k, p, 0), axis=-1, keepdims=True)

        def reaches(floor):
            return jnp.sum(jnp.where(p >= floor, p, 0), axis=-1, keepdims=True) >= of_row["top_p"] * mass

        by_p = jnp.where(of_row["top_p"] < 1, _highest(reaches, p), 0)
        floor = jnp.maximum(jnp.maximum(by_k, by_p), of_row["min_p"])
        # The lowest that is kept, as a logit: exp may give two logits one probability.
        return jnp.min(jnp.where(p >= floor, warm, jnp.inf), axis=-1, keepdims=True)

    anything = jnp.any((of_row["top_k"] > 0) | (of_row["top_p"] < 1) | (of_row["min_p"] > 0))
    nothing = jnp.full((*warm.shape[:2], 1), -jnp.inf, out_sharding=spec("batch", None, None))
    return lax.cond(anything, filtered, lambda: nothing)


def _highest(holds, p: Float[Array, "B T V"]) -> Float[Array, "B T 1"]:
    """The highest floor up to 1 for which `holds` is true, which it is up to there; 0 if it is nowhere.

    Floats above 0 are ordered as their bits: 31 steps find it exactly, where a sort of the vocabulary takes longer.
    """
    as_float = lambda bits: lax.bitcast_convert_type(bits, jnp.float32)  # noqa: E731
    low = jnp.zeros((*p.shape[:2], 1), jnp.int32, out_sharding=spec("batch", None, None))
    high = low + lax.bitcast_convert_type(jnp.float32(1), jnp.int32) + 1

    def halve(_, ends):
        low, high = ends
        middle = low + (high - low) // 2
        good = holds(as_float(middle))
        return jnp.where(good, middle, low), jnp.where(good, high, middle)

    return as_float(lax.fori_loop(0, 31, halve, (low, high))[0])


def _noise(seed: UInt32[Array, "B"], place: Int[Array, "B T"], n: int) -> Float[Array, "B T V"]:
    def of_place(seed, place):
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), place), (n,))

    def local(seed, place):
        return jax.vmap(jax.vmap(of_place, (None, 0)))(seed, place)

    return jax.shard_map(
        local, in_specs=(spec("batch"), spec("batch", None)), out_specs=spec("batch", None, None), check_vma=False
    )(seed, place)
