"""Batches of packed rows: sources -> tokens -> FIM -> rows -> batch = f(seed, step), on any number of processes.

corpus = load_corpus(config.data, config.model.vocab_size, run_folder)
rows = TrainRows(corpus, config.data, config.seq_len, config.seed)
for step, arrays in batches(rows, lambda step: (16 * step, 16 * step + 16), 0, 1000):
    ...
"""

import math
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import grain
import numpy as np

from dsjax.config import ConfigError, DataConfig
from dsjax.data import corpus as texts
from dsjax.data.chats import load_chats
from dsjax.data.corpus import Corpus
from dsjax.data.documents import Epoch, TokenizedDocuments, draw_epoch, slice_document, uniforms
from dsjax.data.packing import PACKERS, Plan, best_fit, concat, render
from dsjax.data.stored import load_stored
from dsjax.data.tokenizer import Tokenizer
from dsjax.data.windows import ShardRows

__all__ = ["Corpus", "TrainRows", "batches", "heldout_rows", "load_corpus", "train_rows"]

KEPT_EPOCHS = 2  # reading threads run ahead into the next one


def load_corpus(
    config: DataConfig, vocab_size: int, folder: Path, *, seed: int = 0, progress: bool = True, make: bool = True
) -> Corpus:
    """The corpus of the run in `folder`: of shards as it is, of text as dsjax.data.corpus keeps it there, and of
    conversations as `dsjax sft` has put it there."""
    if config.learn != "text":
        return load_chats(config, vocab_size, folder)
    stored = load_stored(config, vocab_size, folder, make=make)
    if stored is not None:
        return stored
    return texts.load_corpus(config, vocab_size, folder, seed=seed, progress=progress, make=make)


def train_rows(
    corpus: Corpus, config: DataConfig, seq_len: int, seed: int, say: Callable[[str], None] | None = None
) -> "TrainRows | ShardRows":
    """The rows of training; `say` gets a line for what data.on_error=skip leaves out on the way."""
    if corpus.stored:
        return ShardRows(list(corpus.stored), corpus.tokenizer, config, seq_len, seed, say)
    return TrainRows(corpus, config, seq_len, seed)


class TrainRows:
    """The rows of training, epoch after epoch without end: `rows[i]` is a pure function of (seed, i)."""

    def __init__(self, corpus: Corpus, config: DataConfig, seq_len: int, seed: int):
        if config.fim_rate and corpus.tokenizer.fim_ids is None:
            raise ConfigError(f"data.fim_rate={config.fim_rate}: the tokenizer has no FIM tokens, expected 0")
        self.documents, self.tokenizer = corpus.train, corpus.tokenizer
        self.config, self.seq_len, self.seed = config, seq_len, seed
        self.first_rows = [0]  # of each epoch counted so far, and of the next
        self.plans: dict[int, tuple[Epoch, Plan, np.ndarray]] = {}
        self.lock = threading.Lock()

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        """tokens, segment_ids and positions of a row, each [seq_len] int32."""
        (epoch, plan, order), row = self._find(row)
        pieces = [(epoch.document[i], epoch.cuts[i], start, n) for i, start, n in plan.pieces(order[row])]
        return _render(self.documents, pieces, self.tokenizer, self.seq_len)

    def reading(self) -> str:
        """What the reading threads wait for, as ShardRows says it: of tokens in the run folder, nothing."""
        return ""

    def epoch(self, row: int) -> int:
        """The number of the pass over the documents that a row belongs to."""
        with self.lock:
            while row >= self.first_rows[-1]:
                self._plan(len(self.first_rows) - 1)
            return bisect_right(self.first_rows, row) - 1

    def rows_in(self, epochs: float) -> int:
        """Rows of the first passes over the documents; of a part of one, that part."""
        whole = int(epochs)
        with self.lock:
            while len(self.first_rows) < whole + 2:
                self._plan(len(self.first_rows) - 1)
            first, after = self.first_rows[whole : whole + 2]
        return first + math.ceil((epochs - whole) * (after - first))

    def documents_of(self, row: int) -> list[int]:
        """The training documents of which a row holds a piece, by their numbers in the corpus."""
        (epoch, plan, order), row = self._find(row)
        return [int(epoch.document[index]) for index, _, _ in plan.pieces(order[row])]

    def _find(self, row: int):
        number = self.epoch(row)
        with self.lock:
            return self._plan(number), row - self.first_rows[number]

    def _plan(self, number: int) -> tuple[Epoch, Plan, np.ndarray]:
        """An epoch, its plan and the order of its rows; called with the lock held, epochs first in their order."""
        if number not in self.plans:
            epoch = draw_epoch(self.documents, self.config.fim_rate, self.seed, number)
            plan = PACKERS[self.config.packing](epoch.lengths, self.seq_len)
            # Rows side by side share a document, or its length: mixed, so that a batch is of many documents.
            order = np.argsort(uniforms(plan.n_rows, self.seed, number, 4), kind="stable")
            self.plans[number] = epoch, plan, order
            if number + 1 == len(self.first_rows):
                self.first_rows.append(self.first_rows[-1] + plan.n_rows)
            while len(self.plans) > KEPT_EPOCHS:
                del self.plans[next(k for k in self.plans if k != number)]
        return self.plans[number]


def batches(
    rows: TrainRows | ShardRows,
    ranges: Callable[[int], tuple[int, int]],
    first_step: int,
    last_step: int,
    *,
    micro_batch: int = 1,
    mine: Sequence[int] = (0,),
    threads: int = 2,
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(step, arrays [rows, T]) for each step from first_step until before last_step, read ahead in threads.

    `ranges(step)` is the step's global rows (start, stop), one micro-batch behind the other. Of each micro-batch only
    the rows `mine` are read, the same ones whoever reads the others; by default all.
    """

    def read(step: int):
        start, stop = ranges(step)
        chosen = [rows[first + i] for first in range(start, stop, micro_batch) for i in mine]
        return step, {name: np.stack([row[name] for row in chosen]) for name in chosen[0]}

    dataset = grain.MapDataset.range(first_step, last_step).map(read)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)))


def heldout_rows(corpus: Corpus, seq_len: int) -> dict[str, np.ndarray]:
    """All held-out documents as rows [R, seq_len], in order: each transition inside a document occurs once."""
    documents = corpus.heldout
    plan = (concat if documents.learned is None else best_fit)(documents.lengths + documents.n_specials, seq_len)
    rows = []
    for row in range(plan.n_rows):
        pieces = [(document, (-1, -1), start, length) for document, start, length in plan.pieces(row)]
        rows.append(_render(documents, pieces, corpus.tokenizer, seq_len))
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _render(documents: TokenizedDocuments, pieces: list, tokenizer: Tokenizer, seq_len: int) -> dict[str, np.ndarray]:
    """The row of some pieces (document, cuts for FIM, start, length)."""
    if documents.learned is None:
        parts = [slice_document(documents[i], cuts, tokenizer, start, n) for i, cuts, start, n in pieces]
        return render(parts, seq_len, tokenizer.pad_id)
    parts, learned = (
        [of(i)[start : start + n] for i, _, start, n in pieces] for of in (documents.__getitem__, documents.learned_of)
    )
    row = render(parts, seq_len, tokenizer.pad_id, learned)
    if documents.teacher is not None:
        said = [documents.teacher_of(i) for i, _, _, _ in pieces]  # no conversation is cut
        for name, of in zip(("teacher_ids", "teacher_probs"), zip(*said)):
            row[name] = np.pad(np.concatenate(of), ((0, seq_len - sum(map(len, of))), (0, 0)))
    return row
