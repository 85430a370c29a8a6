"""Documents into rows of T tokens: which piece of which document lies where.

Two packers give the same kind of plan. Both see only lengths, and both keep every transition from a token to the next
one inside a document exactly once; that is why the pieces of a cut document overlap by one token.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Plan:
    """Pieces of documents, sorted by row. Within a row they lie in this order, without gaps, from column 0."""

    row: np.ndarray  # [P] int64
    document: np.ndarray  # [P] int64
    start: np.ndarray  # [P] int64, first token of the piece in its document
    length: np.ndarray  # [P] int64
    n_rows: int

    def pieces(self, row: int) -> list[tuple[int, int, int]]:
        """(document, start, length) of each piece of a row."""
        part = slice(*np.searchsorted(self.row, (row, row + 1)))
        return list(zip(self.document[part].tolist(), self.start[part].tolist(), self.length[part].tolist()))


def concat(lengths: np.ndarray, seq_len: int) -> Plan:
    """The documents as one stream, cut at every row end: row r holds stream[r * (T - 1) :][:T].

    A row end that falls beside a document's first or last token leaves a piece of one token there.
    """
    stride = seq_len - 1
    ends = np.cumsum(lengths, dtype=np.int64)
    begins = ends - lengths
    n_rows = int(-(-(ends[-1] - 1) // stride)) if len(ends) else 0
    first = np.maximum(-(-begins // stride) - 1, 0)  # the first row that holds the document's first token
    last = np.minimum((ends - 1) // stride, n_rows - 1)
    document, row = _ranges(first, last - first + 1)
    start = np.maximum(begins[document], row * stride)
    stop = np.minimum(ends[document], row * stride + seq_len)
    return Plan(row, document, start - begins[document], stop - start, n_rows)


def best_fit(lengths: np.ndarray, seq_len: int) -> Plan:
    """Documents that fit in a row stay whole; each goes, longest first, where it leaves the least room (best-fit
    decreasing). Longer ones are cut into full rows and a rest, which is placed like a document.
    """
    lengths = np.asarray(lengths, np.int64)
    n_pieces = np.maximum(-(-(lengths - 1) // (seq_len - 1)), 1)
    document, start = _ranges(np.zeros_like(lengths), n_pieces)
    start *= seq_len - 1
    length = np.minimum(lengths[document] - start, seq_len)
    row = np.empty(len(length), np.int64)

    rooms: list[int] = []  # the different rooms that rows have left, sorted
    rows_with: dict[int, list[int]] = {}  # those rows, by room
    n_rows = 0
    order = np.argsort(-length, kind="stable")
    for piece, size in zip(order.tolist(), length[order].tolist()):
        place = bisect_left(rooms, size)
        if place == len(rooms):
            chosen, room, n_rows = n_rows, seq_len, n_rows + 1
        else:
            room = rooms[place]
            chosen = rows_with[room].pop()
            if not rows_with[room]:
                del rows_with[room], rooms[place]
        row[piece] = chosen
        if room > size:
            if room - size not in rows_with:
                rows_with[room - size] = []
                insort(rooms, room - size)
            rows_with[room - size].append(chosen)
    order = np.argsort(row, kind="stable")
    return Plan(row[order], document[order], start[order], length[order], n_rows)


PACKERS = {"concat": concat, "best_fit": best_fit}


def render(pieces: list[np.ndarray], seq_len: int, pad_id: int) -> dict[str, np.ndarray]:
    """A row from its pieces of tokens: tokens, segment_ids 1, 2, ... (0 = padding), positions from 0 in each piece."""
    row = {name: np.zeros(seq_len, np.int32) for name in ("tokens", "segment_ids", "positions")}
    row["tokens"][:] = pad_id
    column = 0
    for segment, piece in enumerate(pieces, 1):
        here = slice(column, column + len(piece))
        row["tokens"][here] = piece
        row["segment_ids"][here] = segment
        row["positions"][here] = np.arange(len(piece))
        column += len(piece)
    return row


def _ranges(first: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each i, counts[i] pairs (i, first[i]), (i, first[i] + 1), ... as two arrays."""
    index = np.repeat(np.arange(len(counts)), counts)
    offset = np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)
    return index, first[index] + offset
