"""Sources into a folder of shards, once for all runs: `dsjax data build`.

One process reads the text in its order and writes; the others tokenise. So the files are the same whatever the number
of workers. Each shard takes its name when it is whole, with a note beside it; a build that was killed keeps those whose
sha256 is right, makes the others again, and writes manifest.json last.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dsjax.config import ConfigError, DataConfig
from dsjax.data.blocks import Shard, ShardWriter
from dsjax.data.corpus import (
    ENCODE_BYTES,
    batched,
    compressors_bpb,
    heldout_score,
    survey_sources,
    surveyed_documents,
)
from dsjax.data.manifest import FORMAT, MANIFEST, UNFINISHED, Manifest, load_manifest, tokenizer_digest
from dsjax.data.places import Place
from dsjax.data.sources import Document, parse_source, read_documents
from dsjax.data.split import split_table, split_tokens
from dsjax.data.tokenizer import Tokenizer, bytes_tokenizer

SHARD_TOKENS = 1 << 26
HELDOUT_SHARD_TOKENS = 1 << 22
SMALL = 1000  # so few documents are surveyed first, so that both sides have one
COMPRESSED_BYTES = 1 << 24  # of held-out text that gzip and xz are measured on


@dataclasses.dataclass(frozen=True)
class Job:
    """What decides every byte of a build."""

    sources: tuple[str, ...]
    text_field: str
    on_error: str
    heldout_fraction: float
    split_rate: float
    seed: int
    shard_tokens: int
    tokenizer_sha256: str
    format: int = FORMAT

    @property
    def data(self) -> DataConfig:
        names = ("sources", "text_field", "on_error", "heldout_fraction")
        return DataConfig(**{name: getattr(self, name) for name in names})


@dataclasses.dataclass(frozen=True)
class Done:
    """A shard that is whole: it holds the training documents among texts [first, next) of the sources."""

    shard: Shard
    first: int
    next: int
    text_sha256: str  # of all texts before `next`


def build(
    sources: list[str],
    out: str,
    *,
    tokenizer: str = "bytes",
    workers: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    split_rate: float = 0.0,
    seed: int = 0,
    heldout_fraction: float = 0.02,
    text_field: str = "text",
    on_error: str = "raise",
    progress: bool = True,
) -> Manifest:
    """Makes the folder `out`, or goes on with it; returns its manifest.

    Raises ConfigError for sources that cannot be read or have changed since the build began, and for a folder that
    holds something else.
    """
    for source in sources:
        if parse_source(source)[1] != 1.0:
            raise ConfigError(f"{source}: a build takes no weight; it belongs to training, data.sources={out}:WEIGHT")
    chosen = bytes_tokenizer() if tokenizer == "bytes" else Tokenizer.load(Path(tokenizer))
    sha256 = tokenizer_digest(chosen)
    job = Job(tuple(sources), text_field, on_error, heldout_fraction, split_rate, seed, shard_tokens, sha256)
    place = Place(out)
    if place.local and place.local.exists() and not place.local.is_dir():
        raise ConfigError(f"{out}: expected a folder, and this is a file")
    files = place.files()
    if UNFINISHED not in files and any(not name.startswith(".") for name in files):
        raise ConfigError(f"{out}: expected an empty folder, or one that `dsjax data build` has begun")
    place.make()
    with _alone(place), tempfile.TemporaryDirectory() as drafts:
        drafts = place.local or Path(drafts)
        kept = _begin(place, job, chosen)
        if kept is None:
            return load_manifest(place)
        return Build(place, job, chosen, kept, drafts, workers or len(os.sched_getaffinity(0)), progress).run()


class Build:
    """One call of `build`, past the look at what is there."""

    def __init__(self, place, job, tokenizer, kept, drafts, workers, progress):
        self.place: Place = place
        self.job: Job = job
        self.tokenizer: Tokenizer = tokenizer
        self.kept: list[Done] = kept
        self.drafts: Path = drafts
        self.workers: int = workers
        self.progress: bool = progress
        self.skipped: Counter = Counter()
        self.text = hashlib.sha256()
        self.train: dict[int, Done] = {_number(d.shard.name): d for d in kept}
        self.heldout: list[Shard] = []
        self.heldout_text, self.writers = bytearray(), {}

    def run(self) -> Manifest:
        kept_tokens = sum(done.shard.tokens for done in self.kept)
        bar = tqdm(desc="Build", unit="B", unit_scale=True, disable=None if self.progress else True)
        self.n_tokens = 0
        try:
            with self._encoder() as encode:
                for item, ids in encode(batched(self._wanted(bar), ENCODE_BYTES)):
                    self._add(item, ids)
                    bar.set_postfix(tokens=f"{self.n_tokens + kept_tokens:,}", shards=len(self.train), refresh=False)
            for part in list(self.writers):
                self._close(part)
        finally:
            bar.close()
            for writer, _ in self.writers.values():  # of a build that failed
                with contextlib.suppress(Exception):
                    writer.writer.close()
                writer.path.unlink(missing_ok=True)
        train = [self.train[k].shard for k in sorted(self.train)]
        if not train or not self.heldout:
            which = "held-out" if train else "training"
            raise ConfigError(
                f"--heldout-fraction={self.job.heldout_fraction}: it leaves no {which} document of {self.read:,}; "
                f"expected a {'larger' if train else 'smaller'} one"
            )
        return self._finish(tuple(train), tuple(self.heldout))

    def _documents(self) -> Iterator[tuple[Document, bool]]:
        """Each document, and whether it is held out."""
        data = self.job.data
        few = list(itertools.islice(read_documents(data, Counter()), SMALL + 1))
        if len(few) <= SMALL:
            survey = survey_sources(data)
            self.skipped.update(survey.skipped)
            yield from zip(surveyed_documents(data, survey), survey.heldout.tolist())
            return
        del few
        for document in read_documents(data, self.skipped):
            yield document, heldout_score(document.key) < data.heldout_fraction

    def _wanted(self, bar) -> Iterator["Item"]:
        """The documents that are not in a shard already. Raises ConfigError if those that are have changed."""
        kept = deque(sorted(self.train.values(), key=lambda done: done.first))
        self.read = 0
        for number, (document, heldout) in enumerate(self._documents()):
            data = document.text.encode()
            self.text.update(data + b"\0")
            self.read = number + 1
            bar.update(len(data))
            if heldout and len(self.heldout_text) < COMPRESSED_BYTES:
                self.heldout_text += data
            while kept and number >= kept[0].next:
                kept.popleft()
            inside = kept and kept[0].first <= number
            if inside and self.read == kept[0].next and self.text.hexdigest() != kept[0].text_sha256:
                raise self._changed()
            if heldout or not inside:
                yield Item(document.text, document.key, heldout, number, self.text.hexdigest(), len(data))
        if kept and self.read < kept[-1].next:
            raise self._changed()

    def _changed(self) -> ConfigError:
        return ConfigError(
            f"{','.join(self.job.sources)}: not the text that the build in {self.place} began with; delete the folder, "
            "or choose another"
        )

    @contextlib.contextmanager
    def _encoder(self):
        """A function from batches of items to (item, ids), in their order."""
        options = (self.tokenizer.dumps(), self.tokenizer.beside(), self.job.split_rate, self.job.seed)
        if self.workers == 1:
            _start_worker(*options)
            yield lambda batches: itertools.chain.from_iterable(zip(batch, _encode(batch)) for batch in batches)
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.workers, context, _start_worker, (*options, True)) as pool:

            def encode(batches):
                waiting: deque[tuple[list[Item], Future]] = deque()
                for batch in batches:
                    waiting.append((batch, pool.submit(_encode, batch)))
                    if len(waiting) > 2 * self.workers:
                        done, future = waiting.popleft()
                        yield from zip(done, future.result())
                for done, future in waiting:
                    yield from zip(done, future.result())

            try:
                yield encode
            except BrokenProcessPool:
                raise ConfigError(
                    f"--workers={self.workers}: a worker was killed, perhaps for want of memory; fewer need less, and "
                    "the same command goes on"
                ) from None
            finally:
                pool.shutdown(cancel_futures=True)

    def _add(self, item: "Item", ids: np.ndarray) -> None:
        part = "heldout" if item.heldout else "train"
        if part not in self.writers:
            number = next(k for k in itertools.count() if k not in self.train) if part == "train" else len(self.heldout)
            name = f"{part}-{number:06}.array_record"
            writer = ShardWriter(self.drafts / f".{name}.tmp", self.tokenizer.vocab_size)
            self.writers[part] = writer, name
        writer, _ = self.writers[part]
        writer.add(ids, item.n_bytes)
        self.n_tokens += len(ids)
        if part == "train":
            self.last = item
        if writer.tokens >= (self.job.shard_tokens if part == "train" else HELDOUT_SHARD_TOKENS):
            self._close(part)

    def _close(self, part: str) -> None:
        writer, name = self.writers.pop(part)
        shard = writer.close(name)
        self.place.put(writer.path, name)
        if part == "heldout":
            self.heldout.append(shard)
            return
        number = _number(name)
        before = self.train.get(number - 1)
        done = Done(shard, before.next if before else 0, self.last.number + 1, self.last.text_sha256)
        self.place.write(f"{name}.json", json.dumps(dataclasses.asdict(done)).encode())
        self.train[number] = done

    def _finish(self, train: tuple[Shard, ...], heldout: tuple[Shard, ...]) -> Manifest:
        job, tokenizer = self.job, self.tokenizer
        manifest = Manifest(
            format=FORMAT,
            dsjax=importlib.metadata.version("dsjax"),
            sources=job.sources,
            text_sha256=self.text.hexdigest(),
            seed=job.seed,
            split_rate=job.split_rate,
            heldout_fraction=job.heldout_fraction,
            tokenizer={"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "sha256": job.tokenizer_sha256},
            skipped=dict(self.skipped),
            **compressors_bpb(bytes(self.heldout_text)),
            train=train,
            heldout=heldout,
        )
        self.place.write(MANIFEST, manifest.dumps())
        _clean(self.place)
        return manifest


@dataclasses.dataclass(frozen=True)
class Item:
    """A document on its way to a worker."""

    text: str
    key: str
    heldout: bool
    number: int
    text_sha256: str  # of all texts up to it
    n_bytes: int


@contextlib.contextmanager
def _alone(place: Place):
    """Keeps a second build out of a folder on this machine."""
    if place.local is None:
        yield
        return
    with open(place.local / ".lock", "a") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"{place}: another process is building here") from None
        yield


def _begin(place: Place, job: Job, tokenizer: Tokenizer) -> list[Done] | None:
    """The shards of an earlier call that are whole, or None if all is done. Raises ConfigError for another build."""
    files = place.files()
    wanted = json.loads(json.dumps(dataclasses.asdict(job)))
    found = {}
    with contextlib.suppress(ValueError):
        found = json.loads(place.read(UNFINISHED)) if UNFINISHED in files else {}
    notes = [name for name in files if name.startswith("train-") and name.endswith(".json")]
    if not notes and MANIFEST not in files:  # nothing is done yet
        place.write(UNFINISHED, json.dumps(wanted, indent=1).encode())
        found = wanted
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ConfigError(
                f"{place}: its build began with {name.replace('_', '-')}={json.dumps(found.get(name))}, not "
                f"{json.dumps(value)}; repeat that, delete the folder, or choose another"
            )
    if MANIFEST in files:
        _clean(place)
        return None
    for name, text in {**tokenizer.beside(), "tokenizer.json": tokenizer.dumps()}.items():
        place.write(name, text.encode())
    if place.local:
        for leftover in place.local.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
    kept = [_whole(place, name) for name in notes]
    return [done for done in kept if done is not None]


def _whole(place: Place, note: str) -> Done | None:
    """A shard and its note, if both are as they were written."""
    try:
        values = json.loads(place.read(note))
        done = Done(**values | {"shard": Shard(**values["shard"])})
        same = place.digest(done.shard.name) == (done.shard.sha256, done.shard.size)
    except (ValueError, TypeError, KeyError, OSError):
        return None
    return done if same else None


def _number(name: str) -> int:
    return int(name.partition("-")[2].partition(".")[0])


def _clean(place: Place) -> None:
    """Removes the notes of a build that is whole."""
    for name in place.files():
        if name.startswith("train-") and name.endswith(".json"):
            place.remove(name)


_worker: dict = {}  # what a worker process keeps between batches


def _start_worker(dumped: str, beside: dict[str, str], split_rate: float, seed: int, apart: bool = False) -> None:
    if apart:  # a worker does not outlive the build that was killed
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        parent = multiprocessing.parent_process()
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    folder = Path(tempfile.mkdtemp())
    try:
        for name, text in {**beside, "tokenizer.json": dumped}.items():
            (folder / name).write_text(text, encoding="utf-8")
        tokenizer = Tokenizer.load(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _worker.update(tokenizer=tokenizer, rate=split_rate, seed=seed)
    _worker["table"] = split_table(tokenizer) if split_rate else None


def _end_with(sentinel) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _encode(batch: list[Item]) -> list[np.ndarray]:
    """The ids of each document, int32; those of training documents split."""
    encoded = [np.array(ids, np.int32) for ids in _worker["tokenizer"].encode_batch([item.text for item in batch])]
    if not _worker["rate"]:
        return encoded
    return [
        ids if item.heldout else split_tokens(ids, _worker["table"], _worker["rate"], _worker["seed"], item.key)
        for item, ids in zip(batch, encoded)
    ]
