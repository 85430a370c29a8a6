"""How well a model predicts text it was not trained on: nats a token, and bits a byte beside gzip's and xz's."""

import functools
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsjax import config as configuration
from dsjax.config import ComputeConfig, Config, ConfigError, DataConfig, more_room
from dsjax.data.corpus import compressors_bpb
from dsjax.data.documents import TokenizedDocuments
from dsjax.data.pipeline import Corpus, heldout_rows, load_corpus
from dsjax.data.sources import read_documents
from dsjax.data.stored import load_stored
from dsjax.data.tokenizer import Tokenizer
from dsjax.state import TrainState
from dsjax.train import processes
from dsjax.train.checkpoint import Checkpoints, abstract_state
from dsjax.train.folder import differences, run_tokenizer
from dsjax.train.layout import device_mesh, on_mesh
from dsjax.train.step import heldout_nats

# What an evaluation may change of a run's configuration.
_OPEN = (
    "data.sources",
    "data.text_field",
    "data.on_error",
    "data.cache",
    "mesh.",
    "compute.",
    "batch_size",
    "accumulate",
    "seq_len",
)


class Heldout:
    """The held-out text of a corpus, and how well a state predicts it.

    Each document stands alone, whatever data.document_mask, so that the numbers of all runs compare.
    """

    def __init__(self, corpus: Corpus, config: Config, mesh):
        self.compute, self.facts, self.mesh = config.compute, corpus.facts, mesh
        self.n_bytes = corpus.facts["heldout"].get("bytes")  # of conversations, a part of the tokens counts: no bytes
        rows = heldout_rows(corpus, config.seq_len)
        self.size = config.batch_size // config.accumulate
        pad = -len(rows["tokens"]) % self.size
        self.rows = {name: np.pad(a, ((0, pad), (0, 0))) for name, a in rows.items()}

    def __call__(self, state: TrainState) -> dict[str, Any]:
        """Nats a token and bits a byte, of conversations nats a learned token; those of the averaged weights too if the
        run keeps them."""
        result = self._measure(state.model, state.router_bias)
        if state.ema is not None:
            averaged = self._measure(state.ema, state.router_bias)
            result |= {f"ema_{name}": value for name, value in averaged.items()}
        return result | {name: self.facts[name] for name in ("gzip_bpb", "xz_bpb") if name in self.facts}

    def _measure(self, model, router_bias) -> dict[str, float]:
        sums = np.zeros(3)
        for start in range(0, len(self.rows["tokens"]), self.size):
            rows = {name: a[start : start + self.size] for name, a in self.rows.items()}
            batch = on_mesh(rows, self.mesh)
            while (result := np.asarray(_nats(self.compute)(model, batch, router_bias), np.float64))[2]:
                if self.compute.on_overflow == "drop":
                    break
                self.compute = more_room(self.compute)
            sums += result
        nats, tokens, _ = sums.tolist()
        bits = {} if self.n_bytes is None else {"heldout_bpb": nats / math.log(2) / self.n_bytes}
        return {"heldout_nats": nats / tokens, **bits}


@functools.cache
def _nats(compute: ComputeConfig):
    """One compiled program for all that share a model's shape: the weights, their average, a later evaluation."""
    return jax.jit(functools.partial(heldout_nats, config=Config(compute=compute)))


def evaluate(
    run_folder: Path | str,
    changes: dict[str, Any] | None = None,
    *,
    step: int | None = None,
    whole: Callable[[Config, Path], Corpus] | None = None,
) -> dict[str, Any]:
    """Numbers of a run's checkpoint, the newest by default, on its held-out text, or on all text of other data.sources,
    which `whole` reads; by default as documents.

    Raises ConfigError for a change of what the run is.
    """
    run_folder = Path(run_folder)
    saved = configuration.load(run_folder / "config.json")
    config = configuration.override(saved, changes or {})
    for name, (_, value) in differences(saved, config).items():
        if not name.startswith(_OPEN):
            raise ConfigError(
                f"{name}={configuration.show(value)}: an evaluation cannot change it; it can change "
                f"{', '.join(part + '*' if part.endswith('.') else part for part in _OPEN)}"
            )
    processes.start(config.distributed)
    mesh = device_mesh(config)

    def read(make: bool) -> Corpus:
        if configuration.replace(config.data, cache=saved.data.cache, cache_gib=saved.data.cache_gib) != saved.data:
            if whole is not None:
                return whole(config, run_folder)
            data = configuration.replace(config.data, tokenizer="run")  # other shards must be of the run's tokenizer
            return load_stored(data, None, run_folder) or whole_text(data, run_tokenizer(run_folder))
        size = config.model.vocab_size
        return load_corpus(config.data, size, run_folder, seed=config.seed, progress=False, make=make)

    with (
        processes.together(config.distributed.heartbeat_timeout_s),
        Checkpoints(run_folder, read_only=True) as checkpoints,
    ):
        corpus = processes.first_alone(read)
        with jax.set_mesh(mesh):
            step = checkpoints.find(step)
            state = checkpoints.restore_model(step, abstract_state(config, mesh))
            measured = Heldout(corpus, config, mesh)(state)
    part = corpus.facts["heldout"]
    return {"step": step, **measured, **{f"heldout_{name}": n for name, n in part.items()}}


def whole_text(data: DataConfig, tokenizer: Tokenizer) -> Corpus:
    """All text of the sources as held-out text, held in memory: nothing is written."""
    skipped = Counter()
    texts = [document.text for document in read_documents(data, skipped)]
    if not texts:
        raise ConfigError(f"data.sources={','.join(data.sources)}: no text in them")
    ids = tokenizer.encode_batch(texts)
    lengths = np.array([len(i) for i in ids], np.int64)
    tokens = np.concatenate([np.array(i, np.int32) for i in ids])
    documents = TokenizedDocuments(tokens, lengths, np.ones(len(ids)))
    text = "".join(texts).encode()
    facts = {
        "heldout": {"documents": len(ids), "bytes": len(text), "tokens": len(tokens)},
        "skipped": dict(skipped),
        **compressors_bpb(text),
    }
    return Corpus(tokenizer, documents, documents, text, facts)
