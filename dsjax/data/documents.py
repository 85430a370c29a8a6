"""Tokenised documents, and a document as the model reads it: special tokens around it, and fill-in-the-middle.

A document is `[bos] tokens [eos]`; with FIM in PSM order `[bos] fim_begin prefix fim_hole suffix fim_end middle [eos]`
(DeepSeek-V3, section 4.1).
"""

from dataclasses import dataclass

import numpy as np

from dsjax.data.tokenizer import Tokenizer

N_SPECIALS, N_FIM = 2, 3  # tokens around a document, and those FIM adds


@dataclass(frozen=True)
class TokenizedDocuments:
    """Token ids without special ones, one document behind the other; they may be a memory map.

    Conversations, of which some tokens are `learned`, have all of theirs.
    """

    tokens: np.ndarray  # [N] int32
    lengths: np.ndarray  # [documents] int64
    weights: np.ndarray  # [documents] float64, times a document occurs in an epoch on average
    learned: np.ndarray | None = None  # [N] bool, of conversations
    teacher: tuple[np.ndarray, np.ndarray] | None = None  # of learned tokens in order: [M, K] ids, [M, K] probabilities

    def __post_init__(self):
        object.__setattr__(self, "ends", np.cumsum(self.lengths))
        if self.teacher is not None:
            marks = np.concatenate([[0], np.cumsum(self.learned)])
            object.__setattr__(self, "learned_before", marks[self.ends - self.lengths])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.tokens[self.ends[i] - self.lengths[i] : self.ends[i]]

    def learned_of(self, i: int) -> np.ndarray:
        return self.learned[self.ends[i] - self.lengths[i] : self.ends[i]]

    def teacher_of(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """[N, K] ids and probabilities of a conversation's next tokens: what is known of a token is at the one before
        it. Zeros elsewhere."""
        (places,) = np.nonzero(self.learned_of(i))
        rows = slice(self.learned_before[i], self.learned_before[i] + len(places))
        wide = [np.zeros((self.lengths[i] + 1, a.shape[1]), a.dtype) for a in self.teacher]
        for whole, kept in zip(wide, self.teacher):
            whole[places] = kept[rows]
        return wide[0][1:], wide[1][1:]

    @property
    def n_specials(self) -> int:
        """Tokens that a row adds to each."""
        return N_SPECIALS if self.learned is None else 0


@dataclass(frozen=True)
class Epoch:
    """One pass over the documents: which, in what order, and where each is cut for FIM."""

    document: np.ndarray  # [M] int64
    cuts: np.ndarray  # [M, 2] int64: the middle is tokens[cuts[0] : cuts[1]]; -1 = no FIM
    lengths: np.ndarray  # [M] int64, with special tokens


def draw_epoch(documents: TokenizedDocuments, fim_rate: float, seed: int, epoch: int) -> Epoch:
    """The epoch-th pass, a pure function of its arguments.

    A document of weight 2.3 occurs twice and, drawn anew in each epoch, with probability 0.3 a third time.
    """
    n = len(documents)
    copies = np.floor(documents.weights + uniforms(n, seed, epoch, 0)).astype(np.int64)
    document = np.repeat(np.arange(n), copies)
    m = len(document)
    document = document[np.argsort(uniforms(m, seed, epoch, 1), kind="stable")]
    length = documents.lengths[document]
    fim = uniforms(m, seed, epoch, 2) < fim_rate
    cuts = np.sort(uniforms(2 * m, seed, epoch, 3).reshape(m, 2), axis=1) * (length[:, None] + 1)
    cuts = np.where(fim[:, None], cuts.astype(np.int64), -1)
    return Epoch(document, cuts, length + documents.n_specials + N_FIM * fim)


def slice_document(tokens: np.ndarray, cuts, tokenizer: Tokenizer, start: int, length: int) -> np.ndarray:
    """Tokens [start, start + length) of a document with its special tokens; only these are copied."""
    a, b = (int(c) for c in cuts)
    if a < 0:
        parts = [[tokenizer.bos_id], tokens, [tokenizer.eos_id]]
    else:
        begin, hole, end = tokenizer.fim_ids
        parts = [[tokenizer.bos_id, begin], tokens[:a], [hole], tokens[b:], [end], tokens[a:b], [tokenizer.eos_id]]
    taken = []
    for part in parts:
        taken.append(part[max(start, 0) : max(start + length, 0)])
        start -= len(part)
    return np.concatenate(taken).astype(np.int32)


def uniforms(n: int, *key: int) -> np.ndarray:
    """n numbers in [0, 1), a pure function of the key on every machine and with every numpy.

    numpy promises the raw bits of a bit generator for good, not what its distributions make of them.
    """
    bits = np.random.PCG64(np.random.SeedSequence(key)).random_raw(n)
    return (np.atleast_1d(bits) >> np.uint64(11)) * 2.0**-53
