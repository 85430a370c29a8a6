"""The claim that YaRN and a short phase of longer rows extend a model's context: needles found before and after.

arXiv:2412.19437, section 4.3: YaRN and 1,000 steps at each length take DeepSeek-V3 from 4K to 32K and to 128K tokens,
and needles are found at every length and depth. Here a small model of the same architecture goes from 256 to 2,048.

The model learns to look things up from lines such as `@B73;`: a key, which is a letter, and a value of two digits,
drawn anew in each document and repeated in it, between pieces of Python's standard library. Both trainings are run
folders, so that a claim that was stopped goes on where it was.
"""

import json
import math
import random
import string
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dsjax.claims.runs import only_of, pretrained
from dsjax.config import (
    BalanceConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RopeScaling,
    replace,
)
from dsjax.data.sources import read_documents
from dsjax.files import write_json, write_text
from dsjax.hub.load import load
from dsjax.infer import needle
from dsjax.train import loop

FACTOR = 8
KEYS = "ABCDEFGH"
NEEDLE, LINE_BYTES = f"@{{key:1:{KEYS}}}{{value:2}};", 5
OTHERS = 3  # lines of other keys in the haystack
HAY_CHARS = 4000  # files of the standard library up to this length are hay, longer ones are trained on
SHORT, LONG = 40_000, 3_000  # documents
FILL = {"short": (0.0, 0.0, 0.0, 0.3, 0.6, 0.9), "long": (0.5, 0.8, 0.95)}  # parts of a document that are real text


def small_model() -> Config:
    """Two layers, one of them of experts, that learn to look up in minutes."""
    return Config(
        name="lookup",
        steps=4000,
        batch_size=8,
        seq_len=256,
        log_every=100,
        eval_every=1000,
        checkpoint_every=500,
        model=ModelConfig(
            vocab_size=262,
            hidden_size=128,
            intermediate_size=256,
            moe_intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            kv_lora_rank=64,
            qk_nope_head_dim=32,
            qk_rope_head_dim=32,
            v_head_dim=32,
            n_routed_experts=8,
            num_experts_per_tok=2,
            first_k_dense_replace=1,
            routed_scaling_factor=1.5,
            max_position_embeddings=256,
            initializer_range=0.08,
        ),
        balance=BalanceConfig(sequence=1e-4),
        optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=50, schedule="cosine"),
        data=DataConfig(tokenizer="bytes", packing="best_fit"),
    )


def phase(config: Config, steps: int) -> Config:
    """What comes after it: FACTOR times the positions, by YaRN, at a constant rate."""
    length = FACTOR * config.seq_len
    scaling = RopeScaling(factor=FACTOR, original_max_position_embeddings=config.seq_len)
    return replace(
        config,
        name=f"{config.name}-long",
        steps=steps,
        batch_size=2,
        seq_len=length,
        log_every=10,
        eval_every=steps,
        checkpoint_every=50,
        model=replace(config.model, rope_scaling=scaling, max_position_embeddings=length),
        optimizer=replace(config.optimizer, peak_lr=config.optimizer.peak_lr / 4, schedule="constant", warmup_steps=0),
    )


def test(config: Config, steps: int, trials: int, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Trains what is not trained yet and looks for needles; writes claim.json and claim.png into the folder.

    steps: of the phase. Raises ConfigError if a training was stopped, or is one of another configuration.
    """
    only_of(folder, config, phase_steps=steps)
    text, clock = write_texts(folder / "text", config.seq_len, config.seed), Clock()
    config = replace(config, data=replace(config.data, sources=(f"{text}/short.jsonl",)))
    longer = phase(config, steps)
    longer = replace(longer, data=replace(longer.data, sources=(f"{text}/long.jsonl", f"{text}/short.jsonl:0.2")))
    pretrained(config, folder / "short", None, say)
    clock("short")
    pretrained(longer, folder / "long", folder / "short", say)
    clock("long")
    before, after = load(folder / "short"), load(folder / "long")
    plain = replace(config.model, max_position_embeddings=longer.seq_len)
    models = {
        "before": needle.stretched(before, plain),
        "before, with YaRN": needle.stretched(before, longer.model),
        "after": after,
    }
    hay = (text / "hay.txt").read_text(encoding="utf-8")
    lengths = [config.seq_len << i for i in range(FACTOR.bit_length())]
    found = {
        name: needle.search(model, lengths, trials=trials, needle=NEEDLE, others=OTHERS, text=hay)
        for name, model in models.items()
    }
    clock("needles")
    whole = {
        **compare(found),
        "steps": {"short": config.steps, "long": steps},
        "tokens": {"short": config.steps * config.batch_size * config.seq_len, "long": steps * 2 * longer.seq_len},
        "seconds": clock.seconds,
        "machine": loop.machine(),
    }
    write_json(folder / "claim.json", whole)
    titles = (
        f"{config.steps:,} steps at {config.seq_len}",
        "the same, with YaRN",
        f"+ {steps} steps at {longer.seq_len:,}",
    )
    needle.draw(list(found.values()), folder / "claim.png", titles)
    return whole


def compare(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """By model the mean share of the longest rows; the claim holds if the needles are found after, and not before.

    What YaRN does alone, on weights that were not trained with it, is shown and decides nothing. A model that has not
    learned to look up at its own length tests nothing.
    """
    ends = {name: float(np.mean([row[-1] for row in result["share"]])) for name, result in found.items()}
    holds = ends["after"] >= needle.FOUND > ends["before"]
    longest = found["after"]["lengths"][-1]
    claim = f"needles at {longest:,} tokens are found ({needle.FOUND:.0%} of their tokens) after the phase, not before"
    learned = float(np.mean([row[0] for row in found["before"]["share"]])) >= needle.FOUND
    return {
        "claim": claim,
        "holds": bool(holds and learned),
        "learned": learned,
        "found_at_longest": ends,
        "models": found,
    }


def table(result: dict[str, Any]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Head and rows: percent of the values' tokens found, by model and length, mean of the depths."""
    lengths = result["models"]["after"]["lengths"]
    rows = [
        (name, *(f"{100 * share:.0f}%" for share in np.mean(model["share"], axis=0)))
        for name, model in result["models"].items()
    ]
    return ["model", *(f"{n:,}" for n in lengths)], rows


class Clock:
    """Seconds between calls, by name."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def __call__(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self.last = round(now - self.last, 1), now


def write_texts(folder: Path, seq_len: int, seed: int) -> Path:
    """short.jsonl, long.jsonl and hay.txt, a pure function of the arguments and Python's standard library."""
    files = [document.text for document in read_documents(DataConfig(), Counter())]
    fill = [text.replace("@", "") for text in files if len(text) > HAY_CHARS]
    hay = "\n".join(text.replace("@", "") for text in files if len(text) <= HAY_CHARS)
    folder.mkdir(parents=True, exist_ok=True)
    longest = seq_len - 2  # a document has two tokens around it
    _write(folder / "short.jsonl", _short(random.Random(seed), longest, fill))
    _write(folder / "long.jsonl", _long(random.Random(seed + 1), FACTOR * seq_len - 2, fill))
    (folder / "hay.txt").write_text(hay.encode("ascii", "ignore").decode(), encoding="utf-8")
    return folder


def _short(draw: random.Random, longest: int, texts: list[str]) -> Iterator[str]:
    """Documents of all sizes: looking up is first learned in short ones without other text."""
    for _ in range(SHORT):
        size = int(math.exp(draw.uniform(math.log(min(4 * LINE_BYTES, longest)), math.log(longest))))
        n_keys = draw.randint(2, max(2, min(len(KEYS), size // LINE_BYTES // 2)))
        fill = draw.choice(FILL["short"]) if size > 12 * LINE_BYTES else 0
        yield document(draw, size, n_keys, fill, 0, texts)


def _long(draw: random.Random, size: int, texts: list[str]) -> Iterator[str]:
    for _ in range(LONG):
        yield document(draw, size, len(KEYS), draw.choice(FILL["long"]), 0.5, texts)


def document(draw: random.Random, n_bytes: int, n_keys: int, fill: float, asking: float, texts: list[str]) -> str:
    """A text of n_bytes, `fill` of it from one of texts, with lines of n_keys keys and their values.

    `asking` of the documents have each line once, and at the end all of them again; in the others lines come again and
    again. Bytes that are not ASCII are left out.
    """
    keys = draw.sample(KEYS, n_keys)
    lines = [f"@{key}{''.join(draw.choices(string.digits, k=2))};" for key in keys]
    n = max(2, int(n_bytes * (1 - fill)) // LINE_BYTES)
    if asking and draw.random() < asking:
        end = draw.sample(lines, min(len(lines), n // 2))
        inside = draw.sample(end, len(end))
    else:
        inside, end = draw.choices(lines, k=n), []
    room = max(0, n_bytes - LINE_BYTES * (len(inside) + len(end)))
    text = draw.choice(texts)
    start = draw.randrange(len(text))
    text = (text + text)[start : start + room].encode("ascii", "ignore").decode()
    places = sorted(draw.randrange(len(text) + 1) for _ in inside)
    pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)])]
    return "".join(piece + line for piece, line in zip(pieces, [*inside, ""])) + "".join(end)


def _write(path: Path, texts: Iterator[str]) -> None:
    write_text(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))
