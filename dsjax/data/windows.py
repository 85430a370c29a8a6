"""Rows out of shards, without end: `rows[i]` is a pure function of (seed, i), whoever asks and in whatever order.

Nothing here is as long as the data but two numbers a shard. An epoch is a seeded order of the shards; GROUP of them
are open at a time, their blocks in a seeded order, and a run of these is a window: its documents are shuffled, turned
to fill-in-the-middle and packed, its rows shuffled. How many rows a window has follows from the manifest's counts of
tokens and documents alone (`rows_before`), so any row is found, and a run resumed anywhere, by reading one window.
"""

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from dsjax.config import ConfigError, DataConfig
from dsjax.data.blocks import BadShard, Shard, ShardReader
from dsjax.data.documents import N_FIM, N_SPECIALS, slice_document, uniforms
from dsjax.data.manifest import Manifest
from dsjax.data.mixture import Mixture
from dsjax.data.packing import FITTERS, Plan, render
from dsjax.data.places import Place, ShardCache
from dsjax.data.tokenizer import Tokenizer

GROUP = 4  # shards open at a time
WINDOW_TOKENS, WINDOW_ROWS = 1 << 24, 256  # a window has about this many tokens, and no fewer rows than that
KEPT = 4  # windows of a source in memory: threads at two steps, and the one ahead
_ORDER, _BLOCKS, _DOCUMENTS, _FIM, _CUTS, _ROWS = range(10, 16)  # what a draw is for


@dataclass(frozen=True)
class Stored:
    """A folder of shards in a mixture."""

    place: Place
    manifest: Manifest
    weight: float


@dataclass(frozen=True)
class Group:
    """Open shards, and which of their blocks lie in which window."""

    blocks: list[tuple[int, int]]  # (shard, block) in the order of this epoch
    cuts: np.ndarray  # [windows + 1], places in `blocks`
    first_rows: np.ndarray  # [windows + 1], rows of the epoch before each window
    fim: np.ndarray  # [windows], documents turned to fill-in-the-middle


@dataclass(frozen=True)
class Window:
    """Documents in memory, packed."""

    tokens: np.ndarray  # [N] uint16 or uint32
    blocks: list[tuple[int, int]]  # (shard, block) that the tokens are of
    begins: np.ndarray  # [M], where each document begins in tokens
    lengths: np.ndarray  # [M]
    cuts: np.ndarray  # [M, 2], as slice_document takes them
    plan: Plan
    order: np.ndarray  # [rows]
    first_row: int


class ShardRows:
    """Rows of a mixture of folders: `rows[i]` gives tokens, segment_ids and positions, each [seq_len] int32.

    Of each source as many rows as its tokens times its weight have of all. `say` gets a line for each shard left out.
    """

    def __init__(
        self,
        stored: list[Stored],
        tokenizer: Tokenizer,
        config: DataConfig,
        seq_len: int,
        seed: int,
        say: Callable[[str], None] | None = None,
    ):
        if config.fim_rate and tokenizer.fim_ids is None:
            raise ConfigError(f"data.fim_rate={config.fim_rate}: the tokenizer has no FIM tokens, expected 0")
        self.cache = ShardCache(config.cache, config.cache_gib)
        self.sources = [
            Source(s, number, tokenizer, config, seq_len, seed, self.cache, say or (lambda text: None))
            for number, s in enumerate(stored)
        ]
        self.mixture = Mixture([s.weight * source.rows_an_epoch for s, source in zip(stored, self.sources)])
        least = sum(2 * GROUP * max(s.size for s in s.manifest.train) for s in stored if s.place.local is None)
        if least > self.cache.limit:
            raise ConfigError(
                f"data.cache_gib={config.cache_gib:g}: expected at least {least / 2**30:.3g} for the shards that are "
                "read at a time"
            )

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        source, row = self.mixture[row]
        return self.sources[source][row]

    def reading(self) -> str:
        """What the reading threads wait for now, such as `shard gs://b/train-00003.array_record`; empty if nothing."""
        return ", ".join(dict.fromkeys(self.cache.doing.copy().values()))

    def documents_of(self, row: int) -> list[str]:
        """The documents of which a row holds a piece: `SHARD block B document D`, counted from 0 in the block."""
        source, row = self.mixture[row]
        return self.sources[source].documents_of(row)

    @property
    def left_out(self) -> dict[str, str]:
        """Name and fault of each shard that data.on_error=skip has left out."""
        return {source.name(k): fault for source in self.sources for k, fault in source.faults.items()}


class Source:
    """The rows of one folder of shards, epoch after epoch."""

    def __init__(
        self,
        stored: Stored,
        number: int,
        tokenizer: Tokenizer,
        config: DataConfig,
        seq_len: int,
        seed: int,
        cache: ShardCache,
        say: Callable[[str], None],
    ):
        self.place, self.shards = stored.place, stored.manifest.train
        self.tokenizer, self.config, self.seq_len, self.cache, self.say = tokenizer, config, seq_len, cache, say
        self.key = (seed, number)
        self.documents = np.array([s.documents for s in self.shards])
        self.lengths = np.array([s.tokens for s in self.shards]) + N_SPECIALS * self.documents
        size = max(WINDOW_TOKENS, WINDOW_ROWS * seq_len)
        self.windows_of = np.clip(self.lengths // size, 1, [s.blocks for s in self.shards])
        totals = (int(a.sum()) for a in (self.lengths, self.documents, self.windows_of))
        self.rows_an_epoch = int(self.rows_before(*totals))
        self.faults: dict[int, str] = {}  # shard -> what is wrong with it
        self.lock = threading.Lock()
        self.held: list[Shard] = []
        self.readers = Kept(3 * GROUP, self._open)
        self.orders, self.groups = Kept(2, self._order), Kept(3, self._group)
        self.windows = Kept(KEPT, self._window)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        window, row = self._find(row)
        pieces = []
        for d, start, length in window.plan.pieces(row):
            tokens = window.tokens[window.begins[d] : window.begins[d] + window.lengths[d]]
            pieces.append(slice_document(tokens, window.cuts[d], self.tokenizer, start, length))
        return render(pieces, self.seq_len, self.tokenizer.pad_id)

    def documents_of(self, row: int) -> list[str]:
        window, row = self._find(row)
        begins = [self._opened(shard).block_lengths(block) for shard, block in window.blocks]
        begins = [np.cumsum(lengths) - lengths for lengths in begins]
        tokens = np.concatenate([[0], np.cumsum([self._opened(s).block_tokens[block] for s, block in window.blocks])])
        names = []
        for d, _, _ in window.plan.pieces(row):
            k = int(np.searchsorted(tokens, window.begins[d], "right")) - 1
            document = int(np.searchsorted(begins[k], window.begins[d] - tokens[k]))
            names.append(f"{self.name(window.blocks[k][0])} block {window.blocks[k][1]} document {document}")
        return names

    def _find(self, row: int) -> tuple[Window, int]:
        """The window of a row, and its place in the window's plan."""
        epoch, row = divmod(row, self.rows_an_epoch)
        g = int(np.searchsorted(self.orders[epoch][1], row, "right")) - 1
        while True:
            w = int(np.searchsorted(self.groups[epoch, g].first_rows, row, "right")) - 1
            window = self.windows[epoch, g, w]
            if 0 <= row - window.first_row < len(window.order):
                break  # else a shard was left out meanwhile, and the group is another one
        self.windows.ahead(self._after(epoch, g, w))
        return window, int(window.order[row - window.first_row])

    def name(self, shard: int) -> str:
        return self.place.name(self.shards[shard].name)

    def rows_before(self, length, documents, windows):
        """Rows of an epoch before a place that has this much before it; numbers or arrays.

        A window between two places has at least (its length - 1) / (T - 1) rows, rounded up, which is what its
        documents need if each row's end may cut one, and at most two more.
        """
        return (length + N_FIM * self.fim_before(documents)) // (self.seq_len - 1) + windows

    def fim_before(self, documents):
        return np.floor(self.config.fim_rate * np.asarray(documents)).astype(np.int64)

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the shards in an epoch, and the rows before each group of them."""
        order = np.argsort(uniforms(len(self.shards), *self.key, epoch, _ORDER), kind="stable")
        before = [np.concatenate([[0], np.cumsum(a[order])]) for a in (self.lengths, self.documents, self.windows_of)]
        places = np.minimum(np.arange(0, len(order) + GROUP, GROUP), len(order))
        return order, self.rows_before(*(b[places] for b in before))

    def _members(self, epoch: int, g: int) -> np.ndarray:
        return self.orders[epoch][0][g * GROUP : (g + 1) * GROUP]

    def _after(self, epoch: int, g: int, w: int) -> tuple[int, int, int]:
        """The window after one, found without opening anything."""
        if w + 1 < self.windows_of[self._members(epoch, g)].sum():
            return epoch, g, w + 1
        return (epoch, g + 1, 0) if (g + 1) * GROUP < len(self.shards) else (epoch + 1, 0, 0)

    def _open(self, shard: int) -> ShardReader:
        return self.cache.open(self.place, self.shards[shard])

    def _opened(self, shard: int) -> ShardReader | None:
        """The reader of a shard, None for one left out. Raises ConfigError for a bad one that is not."""
        if shard in self.faults:
            return None
        try:
            return self.readers[shard]
        except BadShard as error:
            self._fault(shard, error)
            return None

    def _fault(self, shard: int, error: BadShard) -> None:
        if self.config.on_error != "skip":
            raise ConfigError(
                f"{self.name(shard)}: {error}; copy it again or build the folder again, or go on without it by "
                "--data.on-error=skip"
            ) from None
        with self.lock:
            known = shard in self.faults
            self.faults[shard] = str(error)
        for kept in (self.groups, self.windows):
            kept.clear()
        if not known:
            count = f"{len(self.faults)} of {len(self.shards)} so far"
            self.say(f"{self.name(shard)}: {error}; left out ({count}), other documents take its place")

    def _group(self, key: tuple[int, int]) -> Group:
        epoch, g = key
        members = self._members(epoch, g).tolist()
        with ThreadPoolExecutor(GROUP) as pool:
            readers = dict(zip(members, pool.map(self._opened, members)))
        self._fetch_ahead(epoch, g, members)
        n = int(self.windows_of[members].sum())
        before = self.orders[epoch][0][: g * GROUP]
        length, documents, windows = (int(a[before].sum()) for a in (self.lengths, self.documents, self.windows_of))
        if any(reader is None for reader in readers.values()):
            return self._mended(epoch, g, readers, n)
        blocks = [(shard, block) for shard in members for block in range(self.shards[shard].blocks)]
        order = np.argsort(uniforms(len(blocks), *self.key, epoch, g, _BLOCKS), kind="stable")
        blocks = [blocks[k] for k in order.tolist()]
        cuts = len(blocks) * np.arange(n + 1) // n
        counts = np.array([len(readers[shard].block_lengths(block)) for shard, block in blocks])
        tokens = np.array([readers[shard].block_tokens[block] for shard, block in blocks])
        counts, tokens = (np.concatenate([[0], np.cumsum(a)])[cuts] for a in (counts, tokens))
        lengths = length + tokens + N_SPECIALS * counts
        first_rows = self.rows_before(lengths, documents + counts, windows + np.arange(n + 1))
        return Group(blocks, cuts, first_rows, np.diff(self.fim_before(documents + counts)))

    def _mended(self, epoch: int, g: int, readers: dict[int, ShardReader | None], n: int) -> Group:
        """A group with shards left out: as many rows, with blocks of others in the place of those that are missing."""
        wanted = sum(self.shards[shard].blocks for shard in readers)
        whole = [shard for shard, reader in readers.items() if reader is not None]
        whole = whole or [s for s in self.orders[epoch][0].tolist() if self._opened(s) is not None][:1]
        if not whole:
            raise ConfigError(f"{self.place}: no shard of it can be read; copy it again or build it again")
        blocks = [(shard, block) for shard in whole for block in range(self.shards[shard].blocks)]
        order = np.argsort(uniforms(len(blocks), *self.key, epoch, g, _BLOCKS), kind="stable").tolist()
        blocks = [blocks[order[k % len(order)]] for k in range(max(wanted, n))]
        first, last = self.orders[epoch][1][g : g + 2].tolist()
        cuts, rows = (total * np.arange(n + 1) // n for total in (len(blocks), last - first))
        counts = np.array([len(self._opened(shard).block_lengths(block)) for shard, block in blocks])
        fim = np.diff(self.fim_before(np.concatenate([[0], np.cumsum(counts)])[cuts]))
        return Group(blocks, cuts, first + rows, fim)

    def _fetch_ahead(self, epoch: int, g: int, members: list[int]) -> None:
        """Brings the next group's shards while this one is read, and lets go of those before."""
        epoch, g, _ = self._after(epoch, g, 1 << 60)
        following = [shard for shard in self._members(epoch, g).tolist() if shard not in self.faults]
        if self.place.local is None:
            held = [self.shards[shard] for shard in {*members, *following}]
            with self.lock:
                held, self.held = self.held, held
            self.cache.hold(self.held)
            self.cache.hold(held, -1)

        def fetch():
            for shard in following:
                try:
                    self.cache.get(self.place, self.shards[shard])
                except (BadShard, OSError):
                    return  # whoever needs it says so

        threading.Thread(target=fetch, daemon=True).start()

    def _window(self, key: tuple[int, int, int]) -> Window:
        while True:
            group = self.groups[key[:2]]
            try:
                return self._packed(group, *key)
            except BadShard as error:
                self._fault(error.shard, error)  # unless it raises, the group is made again without it

    def _packed(self, group: Group, epoch: int, g: int, w: int) -> Window:
        blocks = group.blocks[group.cuts[w] : group.cuts[w + 1]]
        first_row, n_rows = int(group.first_rows[w]), int(group.first_rows[w + 1] - group.first_rows[w])
        key = (*self.key, epoch, g, w)
        lengths, tokens = self._read(blocks)
        order = np.argsort(uniforms(len(lengths), *key, _DOCUMENTS), kind="stable")
        begins, lengths = (np.cumsum(lengths) - lengths)[order], lengths[order]
        fim = np.argsort(uniforms(len(lengths), *key, _FIM), kind="stable") < group.fim[w]
        whole = lengths + N_SPECIALS + N_FIM * fim
        capacity = n_rows * (self.seq_len - 1) + 1
        if whole.sum() > capacity:  # a window with other blocks than its own
            fits = np.cumsum(whole) <= capacity
            if not fits[0]:
                fits[0], lengths[0], fim[0], whole[0] = True, capacity - N_SPECIALS, False, capacity
            begins, lengths, fim, whole = begins[fits], lengths[fits], fim[fits], whole[fits]
        m = len(lengths)
        cuts = np.sort(uniforms(2 * m, *key, _CUTS).reshape(m, 2), axis=1) * (lengths[:, None] + 1)
        cuts = np.where(fim[:, None], cuts.astype(np.int64), -1)
        plan = FITTERS[self.config.packing](whole, self.seq_len, n_rows)
        rows = np.argsort(uniforms(n_rows, *key, _ROWS), kind="stable")
        return Window(tokens, blocks, begins, lengths, cuts, plan, rows, first_row)

    def _read(self, blocks: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """Lengths of the documents of blocks, and all their tokens; a block that occurs twice is read once."""
        found: dict[tuple[int, int], np.ndarray] = {}
        for shard in dict.fromkeys(shard for shard, _ in blocks):
            wanted = sorted({block for s, block in blocks if s == shard})
            reader = self._opened(shard)
            try:
                if reader is None:
                    raise BadShard(self.faults[shard])
                with self.cache.waiting(f"shard {self.name(shard)}"):
                    found |= {(shard, block): a for block, a in zip(wanted, reader.read(wanted))}
            except BadShard as error:
                error.shard = shard
                raise
        lengths = [self._opened(shard).block_lengths(block) for shard, block in blocks]
        return np.concatenate(lengths), np.concatenate([found[block] for block in blocks])


class Kept:
    """The latest values of a function that takes long: one thread makes a value, the others wait for it."""

    def __init__(self, n: int, make: Callable[[Hashable], object]):
        self.n, self.make, self.lock = n, make, threading.Lock()
        self.values: dict[Hashable, Future] = {}

    def __getitem__(self, key):
        future, mine = self._claim(key)
        if mine:
            self._fill(key, future)
        return future.result()

    def ahead(self, key) -> None:
        """Makes a value in a thread, for later."""
        if key not in self.values:
            future, mine = self._claim(key)
            if mine:
                threading.Thread(target=self._fill, args=(key, future), daemon=True).start()

    def forget(self, key) -> None:
        with self.lock:
            self.values.pop(key, None)

    def clear(self) -> None:
        with self.lock:
            self.values.clear()

    def _claim(self, key) -> tuple[Future, bool]:
        with self.lock:
            future = self.values.pop(key, None)
            mine, future = future is None, future or Future()
            self.values[key] = future  # the latest used is the last
            while len(self.values) > self.n:
                del self.values[next(iter(self.values))]
            return future, mine

    def _fill(self, key, future: Future) -> None:
        try:
            future.set_result(self.make(key))
        except BaseException as error:
            self.forget(key)
            future.set_exception(error)
