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


def concat_into(lengths: np.ndarray, seq_len: int, n_rows: int) -> Plan:
    """concat's stream in n_rows rows, at least as many as concat makes: all of them are nearly as full."""
    ends = np.cumsum(lengths, dtype=np.int64)
    begins, last_token = ends - lengths, int(ends[-1]) - 1
    row_begins = last_token * np.arange(n_rows, dtype=np.int64) // n_rows
    row_ends = last_token * np.arange(1, n_rows + 1, dtype=np.int64) // n_rows + 1  # they overlap by one
    first = np.maximum(np.searchsorted(row_ends, begins, "right"), 0)
    last = np.maximum(np.searchsorted(row_begins, ends - 1, "right") - 1, first)
    document, row = _ranges(first, last - first + 1)
    start = np.maximum(begins[document], row_begins[row])
    stop = np.minimum(ends[document], row_ends[row])
    order = np.argsort(row, kind="stable")
    return Plan(row[order], document[order], (start - begins[document])[order], (stop - start)[order], n_rows)


def best_fit_into(lengths: np.ndarray, seq_len: int, n_rows: int) -> Plan:
    """best_fit's rows, made n_rows, at least as many as concat makes.

    Where it needs more, the emptiest of them are dissolved: their pieces fill the room of the others, and a row's end
    cuts one; each row loses at most one token that way, so all fit. Where it needs fewer, rows are parted.
    """
    plan = best_fit(lengths, seq_len)
    used = np.bincount(plan.row, plan.length, plan.n_rows).astype(np.int64)
    keep = np.ones(plan.n_rows, bool)
    keep[np.argsort(used, kind="stable")[: max(plan.n_rows - n_rows, 0)]] = False
    number = np.cumsum(keep) - 1
    stays = keep[plan.row]
    pieces = [(number[plan.row[stays]]), plan.document[stays], plan.start[stays], plan.length[stays]]
    rows: list[list[tuple[int, int, int]]] = [[] for _ in range(n_rows)]
    for row, *piece in zip(*(a.tolist() for a in pieces)):
        rows[row].append(tuple(piece))
    room = dict(enumerate((seq_len - used[keep]).tolist()))
    widest = sorted((r for r in room if room[r] > 1), key=room.get)  # the widest last
    for document, start, length in zip(*(a[~stays].tolist() for a in (plan.document, plan.start, plan.length))):
        while True:
            row = widest.pop()
            taken = min(length, room[row])
            rows[row].append((document, start, taken))
            room[row] -= taken
            if taken == length:
                if room[row] > 1:
                    widest.append(row)
                break
            start, length = start + taken - 1, length - taken + 1
    for empty in range(min(plan.n_rows, n_rows), n_rows):
        _part(rows, empty)
    row = np.repeat(np.arange(n_rows), [len(r) for r in rows])
    document, start, length = np.array([piece for r in rows for piece in r], np.int64).reshape(-1, 3).T
    return Plan(row, document, start, length, n_rows)


def _part(rows: list[list[tuple[int, int, int]]], empty: int) -> None:
    """Moves half of the row with the most pieces to an empty one, or half of the longest piece."""
    fullest = max(range(len(rows)), key=lambda r: len(rows[r]))
    if (n := len(rows[fullest])) > 1:
        rows[fullest], rows[empty] = rows[fullest][: n // 2], rows[fullest][n // 2 :]
        return
    longest = max((r for r in range(len(rows)) if rows[r]), key=lambda r: rows[r][0][2])
    document, start, length = rows[longest][0]
    if (half := (length + 1) // 2) > 1:
        rows[longest] = [(document, start, half)]
        rows[empty] = [(document, start + half - 1, length - half + 1)]


FITTERS = {"concat": concat_into, "best_fit": best_fit_into}


def render(
    pieces: list[np.ndarray], seq_len: int, pad_id: int, learned: list[np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """A row from its pieces of tokens: tokens, segment_ids 1, 2, ... (0 = padding), positions from 0 in each piece.

    With `learned`, which says it of each piece's tokens, the row says it too.
    """
    row = {name: np.zeros(seq_len, np.int32) for name in ("tokens", "segment_ids", "positions")}
    row["tokens"][:] = pad_id
    if learned is not None:
        row["learned"] = np.zeros(seq_len, bool)
        row["learned"][: sum(map(len, learned))] = np.concatenate(learned)
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
