"""Folders of safetensors files: their headers checked before anything is read, slices read, shards written in a stream.

The files are read and written here, not by the safetensors library, for two reasons: it maps whole files into memory,
where a tensor's own pages are enough, and it writes a file only from tensors that are all in memory.
"""

import json
import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import ml_dtypes
import numpy as np

from dsjax.config import ConfigError, show

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000  # bytes, the format's own limit
SHARD_BYTES = 5_000_000_000


class HubError(ConfigError):
    """A checkpoint folder that cannot be read: the message names the file, what is wrong and what was expected."""


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies."""

    file: Path
    dtype: str  # as in the header, "BF16"
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.itemsize

    def read(self, *place: slice) -> np.ndarray:
        """A copy of this part of the tensor, in the file's dtype; only its rows are mapped, only its pages touched."""
        dtype = DTYPES[self.dtype]
        if not self.shape:
            return np.fromfile(self.file, dtype, 1, offset=self.offset).reshape(())
        first = place[0] if place and isinstance(place[0], slice) else slice(None)
        start, stop, _ = first.indices(self.shape[0])
        shape = (max(0, stop - start), *self.shape[1:])
        if not math.prod(shape):
            return np.zeros(shape, dtype)[(slice(None), *place[1:])]
        offset = self.offset + start * math.prod(self.shape[1:]) * self.itemsize
        return np.array(np.memmap(self.file, dtype, mode="r", offset=offset, shape=shape)[(slice(None), *place[1:])])


def open_folder(folder: Path | str) -> dict[str, Stored]:
    """Every tensor of a checkpoint folder by name: one model.safetensors, or shards with their index.

    Raises HubError for a missing or damaged file or index, and for a folder of pickled weights.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise HubError(f"{folder}: no such folder")
    if (folder / INDEX).is_file():
        return _sharded(folder)
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    found = sorted(path.name for path in folder.iterdir())
    if any(name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt")) for name in found):
        pickled = next(name for name in found if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt")))
        raise HubError(
            f"{folder}: {pickled} is a pickle, which can run any code when it is read; expected safetensors "
            "(load it once with transformers on a machine you can lose and save_pretrained it)"
        )
    if any(name.endswith(".safetensors") for name in found):
        raise HubError(f"{folder}: {INDEX} is missing, which says which tensor is in which of the .safetensors files")
    raise HubError(f"{folder}: no weights; expected {SINGLE}, or {INDEX} with its files")


def read_header(file: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors file by name. Raises HubError where the header and the file do not agree."""
    size = file.stat().st_size
    if size < 8:
        raise HubError(f"{file}: {size} bytes, which is no safetensors file")
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > min(size - 8, LONGEST_HEADER):
            raise HubError(f"{file}: truncated or no safetensors file (a header of {length} bytes in {size})")
        header = read_json(f"{file}: header", stream.read(length))
    data = 8 + length
    tensors, ranges = {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        stored, begin, end = _entry(file, name, entry, data)
        if data + end > size:
            raise HubError(
                f"{file}: truncated: {show(name)} ends at byte {data + end} and the file at {size}; fetch it again"
            )
        tensors[name] = stored
        ranges.append((begin, end, name))
    at = 0
    for begin, end, name in sorted(ranges):
        if begin != at:
            raise HubError(
                f"{file}: data_offsets of {show(name)} begin at {begin}, expected {at}: an overlap or a hole"
            )
        at = end
    if data + at != size:
        raise HubError(f"{file}: {size - data - at} bytes behind the last tensor; expected none")
    return tensors


def read_json(where: str, text: bytes) -> dict:
    """The JSON object of a file. Raises HubError; two values of one name are an error, too."""

    def once(pairs):
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            raise HubError(f"{where}: {show(max(names, key=names.count))} is there twice")
        return values

    try:
        values = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except HubError:
        raise
    except (ValueError, RecursionError) as error:
        raise HubError(f"{where}: not JSON: {show(str(error), quote=False)}") from None
    if not isinstance(values, dict):
        raise HubError(f"{where}: expected an object, got a {type(values).__name__}")
    return values


def _entry(file: Path, name: str, entry, data: int) -> tuple[Stored, int, int]:
    def whole(values, n=None):
        good = isinstance(values, list) and all(type(v) is int and 0 <= v < 2**62 for v in values)
        return good and (n is None or len(values) == n)

    if not isinstance(entry, dict) or not whole(entry.get("shape")) or not whole(entry.get("data_offsets"), 2):
        raise HubError(f"{file}: {show(name)}: expected dtype, shape and data_offsets, got {show(entry)}")
    dtype = entry.get("dtype")
    if dtype not in DTYPES:
        raise HubError(f"{file}: {show(name)}: dtype {show(dtype)}; expected one of {', '.join(DTYPES)}")
    begin, end = entry["data_offsets"]
    stored = Stored(file, dtype, tuple(entry["shape"]), data + begin)
    if end - begin != stored.n_bytes:
        raise HubError(
            f"{file}: {show(name)}: data_offsets hold {end - begin} bytes, and {dtype}{entry['shape']} takes "
            f"{stored.n_bytes}"
        )
    return stored, begin, end


def _sharded(folder: Path) -> dict[str, Stored]:
    path = folder / INDEX
    weight_map = read_json(str(path), path.read_bytes()).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise HubError(f"{path}: expected a weight_map from tensor names to file names")
    tensors = {}
    for file in sorted(set(weight_map.values())):
        parts = PurePosixPath(file).parts
        if not parts or PurePosixPath(file).is_absolute() or ".." in parts or "\\" in file or "\0" in file:
            raise HubError(f"{path}: {show(file)} leaves the folder; expected a file inside it")
        if not file.endswith(".safetensors"):
            raise HubError(f"{path}: {show(file)}: expected .safetensors files alone; others can run code when read")
        if not (folder / file).is_file():
            raise HubError(f"{folder / file}: missing, and {INDEX} names it")
        for name, stored in read_header(folder / file).items():
            if weight_map.get(name) != file:
                where = f"in {weight_map[name]}" if name in weight_map else "nowhere"
                raise HubError(f"{folder / file}: holds {show(name)}, which {INDEX} says is {where}")
            tensors[name] = stored
    for name, file in weight_map.items():
        if name not in tensors:
            raise HubError(f"{folder / file}: {show(name)} is not in it, and {INDEX} says it is")
    return tensors


@dataclass(frozen=True)
class Planned:
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def plan_shards(tensors: Iterable[Planned], shard_bytes: int = SHARD_BYTES) -> list[list[Planned]]:
    """The tensors in their order, cut where a file would pass shard_bytes; a tensor is never cut."""
    shards: list[list[Planned]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.n_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.n_bytes
    return shards


def write_shards(folder: Path, shards: list[list[Planned]], pieces: Iterator[np.ndarray]) -> None:
    """Writes the files and their index; `pieces` are the tensors' rows, tensor after tensor, in the order of `shards`.

    One shard is one model.safetensors without an index. Raises ValueError if the pieces are not those of the plan.
    """
    weight_map = {}
    for i, tensors in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        header, at = {"__metadata__": {"format": "pt"}}, 0  # transformers asks for the format
        for t in tensors:
            header[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [at, at + t.n_bytes]}
            at += t.n_bytes
            weight_map[t.name] = name
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
        with (folder / name).open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            for t in tensors:
                left = t.n_bytes
                while left:
                    piece = next(pieces)
                    if piece.dtype != DTYPES[t.dtype] or piece.nbytes > left:
                        raise ValueError(f"{t.name}: a piece of {piece.dtype}{piece.shape} with {left} bytes left")
                    stream.write(np.ascontiguousarray(piece).view(np.uint8).data)
                    left -= piece.nbytes
    if len(shards) > 1:
        total = sum(t.n_bytes for shard in shards for t in shard)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
