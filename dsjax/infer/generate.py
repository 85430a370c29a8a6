"""Continue prompts with the engine: as text piece by piece, or many rows of tokens at once.

for text in stream("runs/tiny", "def ", temperature=0.7, top_p=0.95, max_tokens=200, seed=0):
    print(text, end="")
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax

from dsjax.config import Config, EngineConfig
from dsjax.data.tokenizer import Tokenizer
from dsjax.hub.chat import ChatTemplate
from dsjax.hub.load import Loaded, load
from dsjax.infer.engine import Engine
from dsjax.infer.requests import Request
from dsjax.infer.text import Text
from dsjax.model.transformer import DeepSeek
from dsjax.state import RouterBias


def generate_tokens(
    loaded: Loaded, prompts: Sequence[Sequence[int]], *, options: EngineConfig | None = None, **request
) -> list[list[int]]:
    """Continuations of token prompts, all at once. `request`: fields of Request, for all; row n has seed + n.

    Raises ConfigError for what the model cannot do.
    """
    texts: list[list[int]] = [[] for _ in prompts]
    seed = request.pop("seed", 0)
    with jax.set_mesh(loaded.mesh):
        engine = Engine(loaded, options or EngineConfig(max_rows=len(prompts)))
        for n, (prompt, text) in enumerate(zip(prompts, texts)):

            def tell(said, text=text):
                text.extend(one.token for one in said)

            engine.submit(Request(list(prompt), seed=seed + n, tell=tell, **request))
        engine.run()
    return texts


def continue_text(
    model: DeepSeek,
    router_bias: RouterBias,
    tokenizer: Tokenizer,
    config: Config,
    prompt: str | list[int],
    **request,
) -> Iterator[str]:
    """The continuation of a prompt as text, piece by piece, up to the end of the document. Call it under a mesh.

    prompt: a text, or tokens, to which nothing is added.
    """
    loaded = Loaded(model, router_bias, jax.sharding.get_mesh(), config, Path())
    tokens = [tokenizer.bos_id, *tokenizer.encode(prompt)] if isinstance(prompt, str) else prompt
    return _continue(loaded, tokenizer, tokens, **request)


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
    dtype: str | None = None,
    step: int | None = None,
    say: Callable[[str], None] | None = None,
) -> Iterator[str]:
    """The continuation of a prompt by the model of a run folder or Hub folder, piece by piece.

    The same for the same seed. chat: the prompt is a user's message, put into the folder's chat template behind an
    optional system message, and the answer follows. dtype, step: as `load` takes them. Raises ConfigError for what is
    missing in the folder, or damaged.
    """
    loaded = load(source, dtype, step=step, progress=sys.stderr.isatty(), say=say)
    if chat:
        messages = [{"role": "system", "content": system}] * (system is not None) + [
            {"role": "user", "content": prompt}
        ]
        tokens = loaded.tokenizer.encode_rendered(ChatTemplate.load(loaded.folder).render(messages))
    else:
        tokens = [loaded.tokenizer.bos_id, *loaded.tokenizer.encode(prompt)]
    options = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed}
    with jax.set_mesh(loaded.mesh):
        yield from _continue(loaded, loaded.tokenizer, tokens, **options)


def _continue(loaded: Loaded, tokenizer: Tokenizer, tokens: list[int], **request) -> Iterator[str]:
    room = min(loaded.config.model.max_position_embeddings, _round_up(len(tokens) + request["max_tokens"]))
    engine = Engine(loaded, EngineConfig(max_rows=1, max_model_len=max(2, room)))
    asked, text = Request(tokens, stop_ids=tokenizer.eos_ids, **request), Text(tokenizer)
    pieces = text.follow(asked)
    engine.submit(asked)
    while engine.busy:
        engine.step()
        yield from filter(None, pieces)
        pieces.clear()
    if last := text.end():
        yield last


def _round_up(n: int) -> int:
    """The next power of two, at least 512: few sizes, few compilations."""
    return max(512, 1 << (n - 1).bit_length())
