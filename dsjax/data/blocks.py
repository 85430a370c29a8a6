"""A shard: an ArrayRecord file of blocks of whole documents' tokens, and as its last record the documents' lengths.

A block is a record of its own chunk, so that any one is read alone. Tokens are 16 bits each, and 8 more in a plane of
their own where the vocabulary needs them; the file is compressed, which costs reading little and halves what travels.
Every record begins with its number and a checksum of the rest, so that nothing damaged is taken for tokens.
"""

import hashlib
import os
import struct
import threading
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

BLOCK_TOKENS = 1 << 18
WIDE = 1 << 16  # from this vocabulary on, a token has a third byte
_WRITE = "group_size:1,zstd:1"
_READ = "readahead_buffer_size:0,max_parallelism:0"
_HEAD = struct.Struct("<4sIQI")  # what it is, its number, how many numbers follow, their CRC-32
_BLOCK, _INDEX = b"DSJB", b"DSJI"


class BadShard(Exception):
    """A shard that is not what it was built as. The message says what was found and what was expected."""


@dataclass(frozen=True)
class Shard:
    """What the manifest says of a file."""

    name: str
    sha256: str
    size: int  # bytes
    blocks: int
    documents: int
    tokens: int
    bytes: int  # of text


class ShardWriter:
    """Writes a shard to `path`, document by document."""

    def __init__(self, path: Path, vocab_size: int):
        self.path, self.wide = Path(path), vocab_size > WIDE
        self.writer = ArrayRecordWriter(str(path), _WRITE)
        self.block: list[np.ndarray] = []
        self.lengths: list[int] = []
        self.counts: list[int] = []  # documents of each block written
        self.documents = self.tokens = self.bytes = self.waiting = 0

    def add(self, tokens: np.ndarray, n_bytes: int) -> None:
        self.block.append(tokens)
        self.lengths.append(len(tokens))
        self.waiting += len(tokens)
        self.documents, self.tokens, self.bytes = self.documents + 1, self.tokens + len(tokens), self.bytes + n_bytes
        if self.waiting >= BLOCK_TOKENS:
            self._flush()

    def close(self, name: str) -> Shard:
        if self.block:
            self._flush()
        index = np.array([len(self.counts), *self.counts, *self.lengths], "<u4")
        self.writer.write(_record(_INDEX, len(self.counts), len(index), index.tobytes()))
        self.writer.close()
        with open(self.path, "rb+") as file:
            os.fsync(file.fileno())
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        size, blocks = self.path.stat().st_size, len(self.counts)
        return Shard(name, sha256, size, blocks, self.documents, self.tokens, self.bytes)

    def _flush(self) -> None:
        tokens = np.concatenate(self.block)
        data = (tokens & 0xFFFF).astype("<u2").tobytes()
        if self.wide:
            data += (tokens >> 16).astype("u1").tobytes()
        self.writer.write(_record(_BLOCK, len(self.counts), len(tokens), data))
        self.counts.append(len(self.block))
        self.block, self.waiting = [], 0


class ShardReader:
    """Blocks of a shard on this machine, from several threads. Raises BadShard for whatever is not as it was built."""

    def __init__(self, path: Path, shard: Shard, state: tuple[int, int] | None = None):
        """state: size and time of change of the file whose content was verified."""
        self.path, self.shard, self.lock = Path(path), shard, threading.Lock()
        self.state = state or file_state(path)
        try:
            self.reader = ArrayRecordReader(str(path), _READ)
            self.records = self.reader.num_records()
        except (RuntimeError, ValueError, IndexError) as error:
            raise BadShard(f"not a whole ArrayRecord file ({_first_line(error)})") from None
        if self.records != shard.blocks + 1:
            raise BadShard(f"{self.records} records, expected {shard.blocks + 1}")
        index = np.frombuffer(self._open_record(*self._records([shard.blocks]), _INDEX, shard.blocks, 4), "<u4")
        counts, self.lengths = index[1 : 1 + shard.blocks].astype(np.int64), index[1 + shard.blocks :].astype(np.int64)
        if int(index[0]) != shard.blocks or counts.sum() != len(self.lengths) or self.lengths.sum() != shard.tokens:
            raise BadShard("its index does not fit its manifest")
        self.first_document = np.concatenate([[0], np.cumsum(counts)])
        ends = np.concatenate([[0], np.cumsum(self.lengths)])
        self.block_tokens = np.diff(ends[self.first_document])

    def block_lengths(self, block: int) -> np.ndarray:
        """[documents] int64, tokens of each document of a block."""
        return self.lengths[self.first_document[block] : self.first_document[block + 1]]

    def read(self, blocks: list[int]) -> list[np.ndarray]:
        """The tokens of blocks, each uint16 or uint32 [tokens]."""
        return [self._tokens(block, record) for block, record in zip(blocks, self._records(blocks))]

    def _records(self, numbers: list[int]) -> list[bytes]:
        self._check_state()
        try:
            with self.lock:
                records = self.reader.read(numbers)
        except (RuntimeError, ValueError, IndexError) as error:
            raise BadShard(f"damaged ({_first_line(error)})") from None
        self._check_state()  # what was read is of the file that was verified
        return records

    def _check_state(self) -> None:
        now = file_state(self.path)
        if now != self.state:
            was = f"{self.state[0]} bytes, time {self.state[1]}"
            raise BadShard(f"changed since it was verified (was {was}; now {now[0]} bytes, time {now[1]})")

    def _tokens(self, block: int, record: bytes) -> np.ndarray:
        n = int(self.block_tokens[block])
        wide = len(record) - _HEAD.size == 3 * n
        data = self._open_record(record, _BLOCK, block, 3 if wide else 2)
        if len(data) != (3 if wide else 2) * n:
            raise BadShard(f"block {block} does not hold the {n} tokens of its index")
        low = np.frombuffer(data, "<u2", n)
        return low | np.frombuffer(data, "u1", n, 2 * n).astype(np.uint32) << 16 if wide else low

    def _open_record(self, record: bytes, kind: bytes, number: int, width: int) -> bytes:
        found = _HEAD.unpack_from(record) if len(record) >= _HEAD.size else (b"", 0, 0, 0)
        data = memoryview(record)[_HEAD.size :]
        if found[:2] != (kind, number) or len(data) != width * found[2]:
            raise BadShard(f"record {number} is none of a dsjax shard")
        if (crc := zlib.crc32(data)) != found[3]:
            raise BadShard(f"block {number} is damaged (checksum {crc:08x}, expected {found[3]:08x})")
        return data


def file_state(path: Path) -> tuple[int, int]:
    """Size and time of the last change, in nanoseconds."""
    try:
        stat = os.stat(path)
    except OSError as error:
        raise BadShard(f"cannot be read ({error.strerror})") from None
    return stat.st_size, stat.st_mtime_ns


def _record(kind: bytes, number: int, count: int, data: bytes) -> bytes:
    return _HEAD.pack(kind, number, count, zlib.crc32(data)) + data


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__
