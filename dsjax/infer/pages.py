"""Which pages of the cache are whose: handed out, shared between prompts that begin alike, and taken back.

Plain Python: the pages themselves lie on the devices. A page is free, held by one or more requests, or idle: held by
none and still of use to a prompt that begins as its own did. Idle pages are given away when no free ones are left, the
longest unused first.
"""

import hashlib
from collections import OrderedDict, deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


class Pool:
    """The pages 1 to n_pages - 1; page 0 is for what nobody reads."""

    def __init__(self, n_pages: int):
        self.n_pages = n_pages
        self._free = deque(range(1, n_pages))
        self._held = [0] * n_pages  # how many requests hold each
        self._known: dict[bytes, tuple[int, ...]] = {}  # chunk -> its pages
        self._chunk_of: dict[int, bytes] = {}  # page -> the known chunk that it is part of
        self._idle: OrderedDict[bytes, None] = OrderedDict()  # chunks held by none, the longest unused first
        self.n_idle = 0  # their pages

    @property
    def n_free(self) -> int:
        """Pages that can be had, idle ones among them."""
        return len(self._free) + self.n_idle

    @property
    def n_held(self) -> int:
        return sum(n > 0 for n in self._held)

    def take(self, n: int) -> list[int] | None:
        """n pages for one request; None, and nothing changed, if there are not so many."""
        if n > self.n_free:
            return None
        while len(self._free) < n:
            self._forget(next(iter(self._idle)))
        pages = [self._free.popleft() for _ in range(n)]
        for page in pages:
            self._held[page] = 1
        return pages

    def share(self, chunks: Sequence[bytes]) -> list[int]:
        """Pages of the first of these chunks, one after another, as far as they are known; held once more."""
        pages: list[int] = []
        for chunk in chunks:
            if chunk not in self._known:
                break
            if chunk in self._idle:
                self._wake(chunk)
            for page in self._known[chunk]:
                self._held[page] += 1
            pages += self._known[chunk]
        return pages

    def remember(self, chunk: bytes, pages: Sequence[int]) -> None:
        """These pages, held by a request, hold this chunk from now on. A chunk that is known stays where it is."""
        if chunk not in self._known:
            self._known[chunk] = tuple(pages)
            self._chunk_of.update(dict.fromkeys(pages, chunk))

    def give_back(self, pages: Sequence[int]) -> None:
        """One request's hold on these pages ends."""
        for page in reversed(pages):  # of a prompt, the end is given away first
            self._held[page] -= 1
            if self._held[page]:
                continue
            chunk = self._chunk_of.get(page)
            if chunk is None:
                self._free.append(page)
            elif not any(self._held[p] for p in self._known[chunk]):
                self._idle[chunk] = None
                self.n_idle += len(self._known[chunk])

    def _wake(self, chunk: bytes) -> None:
        del self._idle[chunk]
        self.n_idle -= len(self._known[chunk])

    def _forget(self, chunk: bytes) -> None:
        self._wake(chunk)
        for page in self._known.pop(chunk):
            del self._chunk_of[page]
            self._free.append(page)


def chunk_names(tokens: ArrayLike, size: int) -> list[bytes]:
    """A name for each whole chunk of `size` tokens, made of these and all tokens before them."""
    name, names = b"", []
    ids = np.asarray(tokens, "<i4")
    for start in range(0, len(ids) - len(ids) % size, size):
        name = hashlib.sha256(name + ids[start : start + size].tobytes()).digest()
        names.append(name)
    return names
