"""Continue prompts: prefill in the expanded form, then decode in the absorbed form on the latent cache.

for text in stream("runs/tiny", "def ", temperature=0.7, top_p=0.95, max_tokens=200, seed=0):
    print(text, end="")
"""

import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.config import PLAIN, ComputeConfig, Config, ConfigError, replace
from dsjax.data.tokenizer import Tokenizer
from dsjax.hub.chat import ChatTemplate
from dsjax.hub.load import load
from dsjax.infer.sampling import sample
from dsjax.model.transformer import DeepSeek, unstack
from dsjax.precision import RECIPES, cast_weights
from dsjax.state import Batch, RouterBias
from sharding.rules import spec

CHUNK = 16  # tokens between two looks at the terminal


def generate_tokens(
    model: DeepSeek,
    router_bias: RouterBias,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_ids: tuple[int, ...] = (),
    compute: ComputeConfig = ComputeConfig(),
    one_by_one: bool | None = None,
) -> Iterator[np.ndarray]:
    """Continuations of token prompts, as arrays [B, n <= CHUNK] that follow each other.

    A row ends with one of eos_ids, and is filled up with the first of them.

    one_by_one: whether each layer is its own array (by default on CPU, where a scan over stacked layers copies all
    their weights for each token) or one compiled layer serves all.

    Stops when every row has ended or has max_tokens. Call it under `jax.set_mesh`. Raises ConfigError if max_tokens is
    below 1, or a prompt empty or too long for the model.
    """
    one_by_one = jax.default_backend() == "cpu" if one_by_one is None else one_by_one
    longest, limit = max(map(len, prompts)), model.cfg.max_position_embeddings
    if max_tokens < 1:
        raise ConfigError(f"max_tokens={max_tokens}: expected a whole number greater than 0")
    if min(map(len, prompts)) == 0:
        raise ConfigError("prompt: expected at least one token")
    if longest + max_tokens > limit:
        raise ConfigError(
            f"max_tokens={max_tokens}: expected at most {limit - longest} after a prompt of {longest} tokens, as "
            f"model.max_position_embeddings={limit}"
        )
    room = _round_up(longest)
    tokens = np.zeros((len(prompts), room), np.int32)
    segments = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)], segments[row, : len(prompt)] = prompt, 1
    positions = np.broadcast_to(np.arange(room, dtype=np.int32), tokens.shape)
    batch = Batch(*(jax.device_put(a, spec("batch", "seq")) for a in (tokens, segments, positions)))

    settings = jnp.float32(temperature), jnp.float32(top_p)
    cache_size = _round_up(room + max_tokens + CHUNK)
    key = jax.random.key(seed)
    token, cache = _first(model, batch, router_bias, jax.random.fold_in(key, 0), *settings, cache_size, compute)
    ended = _any_of(token, eos_ids)
    yield np.asarray(token)[:, None]
    layers, cache = _unstack(model, cache) if one_by_one else (None, cache)
    done = 1
    while done < max_tokens and not np.all(ended):
        token, cache, ended, chunk, n = _next(
            model,
            token,
            cache,
            ended,
            layers,
            router_bias,
            key,
            *settings,
            jnp.int32(done),
            jnp.int32(max_tokens),
            eos_ids,
            compute,
        )
        yield np.asarray(chunk)[:, : int(n)]
        done += int(n)


def _round_up(n: int) -> int:
    """The next power of two, at least 32: few sizes, few compilations."""
    return max(32, 1 << (n - 1).bit_length())


@functools.partial(jax.jit, static_argnums=(6, 7))
def _first(model, batch, router_bias, key, temperature, top_p, cache_size, compute):
    logits, cache = model.prefill(batch, router_bias, cache_size, compute)
    return sample(logits, key, temperature, top_p), cache


_unstack = jax.jit(unstack)


@functools.partial(jax.jit, static_argnums=(11, 12), donate_argnums=2)
def _next(model, token, cache, ended, layers, router_bias, key, temperature, top_p, done, max_tokens, eos_ids, compute):
    """Up to CHUNK more tokens of every row: (last token, cache, ended rows, tokens [B, CHUNK], how many)."""

    def more(carry):
        i, _, _, ended, _ = carry
        return (i < CHUNK) & (done + i < max_tokens) & ~jnp.all(ended)

    def step(carry):
        i, token, cache, ended, chunk = carry
        logits, cache = model.decode(token[:, None], cache, router_bias, compute, layers)
        # The key depends on the token's place alone: the same seed, whatever the chunk.
        token = sample(logits[:, 0], jax.random.fold_in(key, done + i), temperature, top_p)
        token = jnp.where(ended, eos_ids[0], token) if eos_ids else token
        chunk = jax.lax.dynamic_update_slice_in_dim(chunk, token[:, None], i, axis=1)
        return i + 1, token, cache, ended | _any_of(token, eos_ids), chunk

    chunk = jnp.zeros((token.shape[0], CHUNK), jnp.int32, out_sharding=spec("batch", None))
    n, token, cache, ended, chunk = jax.lax.while_loop(more, step, (jnp.int32(0), token, cache, ended, chunk))
    return token, cache, ended, chunk, n


def _any_of(token: jax.Array, ids: tuple[int, ...]) -> jax.Array:
    return functools.reduce(jnp.logical_or, (token == i for i in ids), jnp.zeros_like(token, bool))


def continue_text(
    model: DeepSeek, router_bias: RouterBias, tokenizer: Tokenizer, config: Config, prompt: str, **options
) -> Iterator[str]:
    """The continuation of a prompt as text, piece by piece, up to the end of the document."""
    tokens = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    return _continue(model, router_bias, tokenizer, config.compute, tokens, **options)


def _continue(
    model: DeepSeek, router_bias: RouterBias, tokenizer: Tokenizer, compute: ComputeConfig, tokens: list[int], **options
) -> Iterator[str]:
    compute = replace(compute, precision=PLAIN[RECIPES[compute.precision].dtype])  # nothing is quantised here
    model = cast_weights(model, compute.precision)
    chunks = generate_tokens(model, router_bias, [tokens], eos_ids=tokenizer.eos_ids, compute=compute, **options)
    ids = (token for chunk in chunks for token in chunk[0].tolist())
    ended = itertools.takewhile(lambda token: token not in tokenizer.eos_ids, ids)
    return tokenizer.decode_stream(ended)


def stream(
    source: Path | str,
    prompt: str,
    *,
    chat: bool = False,
    system: str | None = None,
    temperature: float = 0.7,
    top_p: float = 0.95,
    max_tokens: int = 200,
    seed: int = 0,
    step: int | None = None,
    say: Callable[[str], None] | None = None,
) -> Iterator[str]:
    """The continuation of a prompt by the model of a run folder or Hub folder, piece by piece.

    The same for the same seed. chat: the prompt is a user's message, put into the folder's chat template behind an
    optional system message, and the answer follows. Raises ConfigError for what is missing in the folder, or damaged.
    """
    loaded = load(source, step=step, progress=sys.stderr.isatty(), say=say)
    if chat:
        messages = [{"role": "system", "content": system}] * (system is not None) + [
            {"role": "user", "content": prompt}
        ]
        tokens = loaded.tokenizer.encode_rendered(ChatTemplate.load(loaded.folder).render(messages))
    else:
        tokens = [loaded.tokenizer.bos_id, *loaded.tokenizer.encode(prompt)]
    options = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed}
    with jax.set_mesh(loaded.mesh):
        yield from _continue(
            loaded.model, loaded.router_bias, loaded.tokenizer, loaded.config.compute, tokens, **options
        )
