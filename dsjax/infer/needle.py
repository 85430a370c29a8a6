"""A needle in a haystack: what a model finds again of one line, by the length of the text and the line's place in it.

    result = search("runs/tiny-2k", lengths=[256, 512, 1024, 2048])
    draw([result], Path("needle.png"))

A needle is a line such as `The code of XKQZ is 7730.` with a key and a value that are drawn anew in every trial. The
haystack is text that the model was not trained on, and at its end stands the line's beginning once more: what comes
next is the value. Scored are the likeliest tokens at its places (greedy decoding, had all before been right).
"""

import dataclasses
import functools
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsjax.config import PLAIN, ComputeConfig, ConfigError, DataConfig, ModelConfig, replace, show
from dsjax.data.sources import read_documents
from dsjax.data.tokenizer import Tokenizer
from dsjax.files import replacing
from dsjax.hub.load import Loaded, load
from dsjax.model.transformer import DeepSeek
from dsjax.precision import RECIPES, cast_weights
from dsjax.state import Batch, RouterBias
from sharding.rules import spec

NEEDLE = "\nThe code of {key:4} is {value:4}.\n"
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
FOUND = 0.9  # share of the value's tokens from which a length counts as found
_TOKENS = 8192  # of the rows that are computed at a time
_HAYSTACK_BYTES = 1 << 20


@dataclass(frozen=True)
class Needle:
    """A line with a key and a value, in three parts: what asks, the value, and the line's end."""

    asks: str  # with {key}
    ends: str
    key: tuple[str, int]  # the characters it is drawn from, and how many
    value: tuple[str, int]

    @classmethod
    def parse(cls, text: str) -> "Needle":
        """`The code of {key:4} is {value:4}.`: a key of 4 letters, a value of 4 digits; {key:1:ABC} is A, B or C.

        Raises ConfigError.
        """
        key, value = (rf"\{{{name}:(\d{{1,2}})(?::(\w+))?\}}" for name in ("key", "value"))
        found = re.fullmatch(rf"([^{{}}]*){key}([^{{}}]*){value}([^{{}}]*)", text)
        if found is None or not (int(found[2]) and int(found[5])):
            raise ConfigError(f"--needle={show(text)}: expected a text with {{key:N}} and, behind it, {{value:N}}")
        before, n_key, letters, between, n_value, digits, ends = found.groups()
        return cls(
            f"{before}{{key}}{between}",
            ends,
            (letters or string.ascii_uppercase, int(n_key)),
            (digits or string.digits, int(n_value)),
        )

    def draw(self, rng: np.random.Generator, n: int) -> list[tuple[str, str]]:
        """n keys, no two the same, and their values. Raises ConfigError where there are not so many keys."""
        known = len(set(self.key[0])) ** self.key[1]
        if n > known:
            raise ConfigError(
                f"--others={n - 1}: expected less than the {known} keys of {self.key[1]} of {self.key[0]}"
            )
        pairs: dict[str, str] = {}
        while len(pairs) < n:
            key, value = ("".join(rng.choice(list(of), k)) for of, k in (self.key, self.value))
            pairs.setdefault(key, value)
        return list(pairs.items())

    def encode(self, tokenizer: Tokenizer, key: str, value: str) -> tuple[list[int], list[int], list[int]]:
        """Tokens of what asks, of the value and of the end; a space before the value is the value's."""
        asks = self.asks.replace("{key}", key)
        space = " " * asks.endswith(" ")
        return tuple(tokenizer.encode_batch([asks.removesuffix(space), space + value, self.ends]))


def hide(
    hay: np.ndarray,
    needle: tuple[Sequence[int], Sequence[int], Sequence[int]],
    length: int,
    depth: float,
    *,
    bos: int,
    others: Sequence[tuple[float, Sequence[int]]] = (),
) -> tuple[np.ndarray, int]:
    """A row of `length` tokens and the place where the answer, its last tokens, begins.

    bos, hay with the needle before its round(depth * n)-th of n tokens, what asks, the answer. others: (depth, tokens)
    of other lines, which stand before the needle where both have one place. Raises ConfigError where the lines leave no
    room for a token of hay, and ValueError for too little hay.
    """
    asks, answer, ends = needle
    line = [*asks, *answer, *ends]
    n = length - 1 - len(line) - len(asks) - len(answer) - sum(len(tokens) for _, tokens in others)
    if n < 1:
        raise ConfigError(f"--lengths={length}: expected at least {length + 1 - n}, for the needles and one more token")
    if len(hay) < n:
        raise ValueError(f"{len(hay)} tokens of hay, expected {n}")
    places = [*((round(at * n), 0, tokens) for at, tokens in others), (round(depth * n), 1, line)]
    row, done = [bos], 0
    for at, _, tokens in sorted(places, key=lambda place: place[:2]):
        row += [*hay[done:at], *tokens]
        done = at
    row += [*hay[done:n], *asks, *answer]
    return np.array(row, np.int32), length - len(answer)


def search(
    source: Path | str | Loaded,
    lengths: Sequence[int] | None = None,
    depths: Sequence[float] = DEPTHS,
    *,
    trials: int = 10,
    needle: str = NEEDLE,
    others: int = 0,
    text: str | None = None,
    seed: int = 0,
    step: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Shares of the value's tokens that a model finds, and of values found whole, [depths][lengths].

    source: a run folder, a Hub folder, or what `load` gave. lengths: tokens a row; by default an eighth, a quarter, a
    half and all of what the model takes, at most 4,096. others: needles of other keys that lie in the haystack too.
    text: the hay; by default the run's held-out text, or else the sources of Python's standard library. The trials of
    two models with the same tokenizer are the same. Raises ConfigError for what cannot be searched.
    """
    line = Needle.parse(needle)
    loaded = source if isinstance(source, Loaded) else load(source, step=step, say=say)
    config, tokenizer = loaded.config, loaded.tokenizer
    limit = config.model.max_position_embeddings
    lengths = sorted(set(lengths)) if lengths else default_lengths(limit)
    if lengths[-1] > limit:
        raise ConfigError(f"--lengths={lengths[-1]}: expected at most model.max_position_embeddings={limit}")
    hay = np.array(tokenizer.encode(text or heldout_text(loaded.folder)), np.int32)
    if len(hay) < lengths[-1]:
        hay = np.tile(hay, -(-lengths[-1] // len(hay)))
    compute = replace(config.compute, precision=PLAIN[RECIPES[config.compute.precision].dtype], expert_buffer=None)
    model = cast_weights(loaded.model, compute.precision)
    share, exact = (np.zeros((len(depths), len(lengths))) for _ in range(2))
    with jax.set_mesh(loaded.mesh):
        for column, length in enumerate(lengths):
            say(f"{length} tokens")
            made = [
                _trial(line, tokenizer, hay, length, depth, others, [seed, length, i, trial])
                for i, depth in enumerate(depths)
                for trial in range(trials)
            ]
            right = _right(model, loaded.router_bias, made, length, compute)
            for i in range(len(depths)):
                part = right[i * trials : (i + 1) * trials]
                share[i, column] = np.mean(np.concatenate(part))
                exact[i, column] = np.mean([all(tokens) for tokens in part])
    return {
        "name": config.name,
        "lengths": list(lengths),
        "depths": list(depths),
        "trials": trials,
        "others": others,
        "needle": needle,
        "trained_length": trained_length(loaded),
        "share": share.tolist(),
        "exact": exact.tolist(),
    }


def stretched(loaded: Loaded, model: ModelConfig) -> Loaded:
    """The same weights with another rope_scaling or max_position_embeddings, untrained for it."""
    with jax.set_mesh(loaded.mesh):
        like = jax.eval_shape(lambda: DeepSeek(model, rngs=nnx.Rngs(0)))
    weights = jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(loaded.model))
    return dataclasses.replace(loaded, model=weights, config=replace(loaded.config, model=model))


def default_lengths(limit: int) -> list[int]:
    """An eighth, a quarter, a half and all of a context of at most 4,096 tokens, none shorter than 64."""
    limit = min(limit, 4096)
    return [max(limit >> i, min(64, limit)) for i in (3, 2, 1, 0)] if limit > 512 else [max(limit // 2, 1), limit]


def trained_length(loaded: Loaded) -> int:
    """Positions that the model saw before any extension: YaRN's, or else the rows of its training."""
    scaling = loaded.config.model.rope_scaling
    return loaded.config.seq_len if scaling is None else scaling.original_max_position_embeddings


def heldout_text(folder: Path) -> str:
    path = folder / "data" / "heldout.txt"
    if path.is_file():
        return path.read_text(encoding="utf-8", errors="replace")[:_HAYSTACK_BYTES]
    text, size = [], 0
    for document in read_documents(DataConfig(), Counter()):
        text.append(document.text)
        size += len(document.text)
        if size >= _HAYSTACK_BYTES:
            break
    return "".join(text)


def _trial(line: Needle, tokenizer: Tokenizer, hay, length: int, depth: float, others: int, seed: list[int]):
    """A row [length] and the place where its answer begins, a pure function of the arguments."""
    rng = np.random.default_rng(seed)
    (mine, value), *rest = line.draw(rng, 1 + others)
    start = rng.integers(len(hay) - length + 1)
    lines = [[token for part in line.encode(tokenizer, *pair) for token in part] for pair in rest]
    needle = line.encode(tokenizer, mine, value)
    return hide(
        hay[start : start + length],
        needle,
        length,
        depth,
        bos=tokenizer.bos_id,
        others=[(float(rng.random()), tokens) for tokens in lines],
    )


def _right(model, router_bias, trials: list[tuple[np.ndarray, int]], length: int, compute) -> list[np.ndarray]:
    """Of each trial, which of the answer's tokens were the likeliest."""
    size, most = max(1, min(len(trials), _TOKENS // length)), max(length - start for _, start in trials)
    right = []
    for first in range(0, len(trials), size):
        part = trials[first : first + size]
        rows = np.stack([part[min(i, len(part) - 1)][0] for i in range(size)])
        guesses = np.asarray(_guesses(model, _batch(rows), router_bias, most, compute))
        right += [guesses[i, most - (length - start) :] == row[start:] for i, (row, start) in enumerate(part)]
    return right


def _batch(rows: np.ndarray) -> Batch:
    positions = np.broadcast_to(np.arange(rows.shape[1], dtype=np.int32), rows.shape)
    return Batch(*(jax.device_put(a, spec("batch", "seq")) for a in (rows, np.ones_like(rows), positions)))


@functools.partial(jax.jit, static_argnums=(3, 4))
def _guesses(model: DeepSeek, batch: Batch, router_bias: RouterBias, most: int, compute: ComputeConfig):
    """[B, most] the likeliest tokens at each row's last places."""
    hidden = model(batch, router_bias, compute).hidden[:, -most - 1 : -1]
    return jnp.argmax(model.logits(hidden), axis=-1)


def draw(results: Sequence[dict[str, Any]], path: Path, titles: Sequence[str] = ()) -> None:
    """Heat maps side by side, depth by length, as PNG: the share of the value's tokens that were found."""
    import matplotlib
    from matplotlib.figure import Figure

    from dsjax.train.picture import INK, STYLE

    titles = titles or [result["name"] for result in results]
    columns = max(len(result["lengths"]) for result in results)
    width = max(1.3 + 0.95 * columns, 4.0)
    with matplotlib.rc_context(STYLE):
        figure = Figure(
            figsize=(len(results) * width + 0.9, 1.9 + 0.5 * len(results[0]["depths"])), layout="constrained"
        )
        panels = figure.subplots(1, len(results), squeeze=False)[0]
        for panel, result, title in zip(panels, results, titles):
            share = 100 * np.array(result["share"])
            image = panel.imshow(share, aspect="auto", vmin=0, vmax=100, cmap="YlGnBu", interpolation="nearest")
            for (i, j), value in np.ndenumerate(share):
                panel.text(
                    j, i, f"{value:.0f}", ha="center", va="center", color="w" if value > 55 else INK, fontsize=11
                )
            _mark_trained(panel, result)
            panel.set_title(title, pad=18)
            panel.set_xlabel("length, tokens")
            panel.set_xticks(range(len(result["lengths"])), [f"{n:,}" for n in result["lengths"]])
            panel.set_yticks(range(len(result["depths"])), [f"{depth:.0%}" for depth in result["depths"]])
            panel.grid(False)
            panel.spines[:].set_visible(False)
            panel.tick_params(length=0, colors=INK)
        panels[0].set_ylabel("needle's place: 0% = the beginning")
        figure.colorbar(image, ax=panels.tolist(), label="% of the value's tokens found", pad=0.01)
        with replacing(path) as file:
            figure.savefig(file, dpi=110)


def _mark_trained(panel, result) -> None:
    """A line behind the longest length that the model saw before an extension, where it lies inside the map."""
    from dsjax.train.picture import ORANGE

    inside = sum(length <= result["trained_length"] for length in result["lengths"])
    if 0 < inside < len(result["lengths"]):
        panel.axvline(inside - 0.5, color=ORANGE, lw=2.5)
        said = f"trained to {result['trained_length']:,}"
        panel.text(inside - 0.5, -0.56, said, va="bottom", ha="center", fontsize=9, color=ORANGE)


def table(result: dict[str, Any]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Head and rows: percent of the value's tokens found, a row a depth."""
    rows = [
        (f"{depth:.0%}", *(f"{100 * value:.0f}%" for value in row))
        for depth, row in zip(result["depths"], result["share"])
    ]
    mean = tuple(f"{100 * value:.0f}%" for value in np.mean(result["share"], axis=0))
    return ["depth", *(f"{n:,}" for n in result["lengths"])], [*rows, ("mean", *mean)]
