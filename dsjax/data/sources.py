"""Documents from files: the standard library, text, .jsonl, .parquet, ArrayRecord, folders and globs of them.

`read_documents` streams them in a fixed order, so that two passes see the same text. What cannot be read is an error
that names file and line, or, with data.on_error=skip, a count by reason.
"""

import glob
import gzip
import hashlib
import importlib
import io
import json
import math
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from dsjax.config import ConfigError, DataConfig

T = TypeVar("T")
STDLIB_SKIPS = {"test", "tests", "idlelib", "idle_test", "site-packages", "dist-packages", "__pycache__"}
TEXT = {".txt", ".md", ".rst", ".tex", ".html", ".xml", ".csv", ".json", ".yaml", ".yml", ".toml", ".ini", ".ipynb"}
TEXT |= {".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".js", ".ts", ".sh", ".sql"}


@dataclass(frozen=True)
class Document:
    """One text. `key` is what its place, training or held-out, is chosen by."""

    name: str
    text: str
    key: str
    weight: float = 1.0


class BadInput(Exception):
    """A file or record that cannot be read: `place` is file and line, `reason` is counted when it is skipped."""

    def __init__(self, place: str, reason: str, detail: str):
        super().__init__(f"{place}: {detail}")
        self.reason = reason


def read_documents(config: DataConfig, skipped: Counter) -> Iterator[Document]:
    """Every document of config.sources, in order; what was left out is counted in `skipped` by reason.

    Raises ConfigError for a source that is not there and, unless data.on_error=skip, for anything unreadable in it.
    """
    for source in config.sources:
        pattern, weight = parse_source(source)
        for name, key, text in _guard(config, skipped, _read_source(config, skipped, pattern)):
            if text.strip():
                yield Document(name, text, key, weight)
            else:
                skipped["empty"] += 1


def read_records(config: DataConfig, parse: Callable[[dict, str], T], skipped: Counter) -> Iterator[tuple[T, float]]:
    """What `parse(record, place)` makes of every JSON object in the .jsonl files of config.sources, and its weight.

    `parse` raises BadInput for what is wrong with one. That, and what cannot be read, is raised or counted as by
    read_documents.
    """

    def records(pattern: str) -> Iterator:
        for path, _ in _find_files(pattern, skipped):
            if READERS.get(_suffix(path)) is _read_lines:
                yield from _unharmed(path, _parsed(path, parse))
            else:
                yield BadInput(str(path), "unknown suffix", "expected a .jsonl file")

    for source in config.sources:
        pattern, weight = parse_source(source)
        for value in _guard(config, skipped, records(pattern)):
            yield value, weight


def source_files(config: DataConfig) -> list[tuple[Path, float]]:
    """The files of config.sources in the order in which they are read, and their weights."""
    sources = [parse_source(source) for source in config.sources]
    return [(path, weight) for pattern, weight in sources for path, _ in _find_files(pattern, Counter())]


def _parsed(path: Path, parse: Callable[[dict, str], T]) -> Iterator[T | BadInput]:
    for line, record, _ in _read_lines(path, ""):
        place = f"{path}: {line}"
        try:
            value = _parse_object(record, place)
            _check_unicode(json.dumps(value, ensure_ascii=False), "the record", place)
            yield parse(value, place)
        except BadInput as error:
            yield error


def parse_source(source: str) -> tuple[str, float]:
    """PATH and WEIGHT of `PATH` or `PATH:WEIGHT`; without one it is 1, and each document occurs once an epoch."""
    pattern, colon, weight = source.rpartition(":")
    if not colon or Path(source).exists():
        return source, 1.0
    try:
        value = float(weight)
    except ValueError:
        return source, 1.0
    if not (value > 0 and math.isfinite(value)):
        raise ConfigError(f"data.sources={source}: expected a positive weight after the colon, got {weight}")
    return pattern, value


def _guard(config: DataConfig, skipped: Counter, items: Iterator) -> Iterator:
    """Passes documents on; the BadInput among them is raised as ConfigError, or counted."""
    for item in items:
        if not isinstance(item, BadInput):
            yield item
        elif config.on_error == "skip":
            skipped[item.reason] += 1
        else:
            raise ConfigError(f"{item}; repair it, or leave such input out with --data.on-error=skip") from None


def _read_source(config: DataConfig, skipped: Counter, pattern: str) -> Iterator:
    if pattern == "stdlib":
        yield from _read_stdlib()
        return
    for path, name in _find_files(pattern, skipped):
        yield from _read_file(path, name, config.text_field)


def _find_files(pattern: str, skipped: Counter) -> list[tuple[Path, str]]:
    """The files of a path, folder or glob, sorted by the name that does not depend on where the folder lies."""
    path = Path(pattern).expanduser()
    if path.is_file():
        return [(path, path.name)]
    if path.is_dir():
        files = [p for p in path.rglob("*") if p.is_file() and not _is_hidden(p.relative_to(path))]
        known = [p for p in files if _suffix(p) in TEXT | READERS.keys()]
        if not known:
            raise ConfigError(f"data.sources={pattern}: no text, .jsonl, .parquet or .array_record file in this folder")
        skipped.update(["unknown suffix"] * (len(files) - len(known)))
        return sorted(((p, p.relative_to(path).as_posix()) for p in known), key=lambda pair: pair[1])
    if glob.has_magic(pattern):
        files = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if not files:
            raise ConfigError(f"data.sources={pattern}: no file matches this pattern")
        parts = path.parts
        root = Path(*parts[: next(i for i, part in enumerate(parts) if glob.has_magic(part))])
        return [(p, p.relative_to(root).as_posix()) for p in files]
    raise ConfigError(f"data.sources={pattern}: no such file or folder; expected stdlib, a file, a folder or a glob")


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def _suffix(path: Path) -> str:
    """The suffix that tells the format: that before .gz or .zst, if there is one."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in (".gz", ".zst"):
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _read_stdlib() -> Iterator:
    """The running interpreter's library without tests and idlelib, then its help topics as one document each."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [(p.relative_to(root), p) for p in root.rglob("*.py")]
    for name, path in sorted((p.as_posix(), path) for p, path in files if not STDLIB_SKIPS & set(p.parts[:-1])):
        if name != "pydoc_data/topics.py":  # a dict of texts, which follow as such
            yield from _read_file(path, name, "")
    if not files:
        yield BadInput("data.sources=stdlib", "no stdlib", f"this Python has no library sources under {root}")
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # left out by some distributions
        topics = {}
    for name in sorted(topics):
        yield f"pydoc_data/topics/{name}", f"pydoc_data/topics/{name}", topics[name]


def _read_file(path: Path, name: str, field: str) -> Iterator:
    """(name, key, text) of each document of a file; BadInput in the place of each that cannot be read."""

    def documents() -> Iterator:
        if _suffix(path) not in READERS:
            yield name, name, _decode(_open(path).read(), str(path), is_file=True)
            return
        for place, record, parse in READERS[_suffix(path)](path, field):
            try:
                text = parse(record, field, f"{path} {place}")
            except BadInput as error:
                yield error
            else:
                # By content: a text that occurs twice is on one side only, wherever its copies lie.
                yield f"{name} {place}", hashlib.sha256(text.encode()).hexdigest(), text

    yield from _unharmed(path, documents())


def _unharmed(path: Path, items: Iterator) -> Iterator:
    """The items that are read from a file; BadInput where it cannot be read any further."""
    try:
        yield from items
    except BadInput as error:
        yield error
    except (OSError, EOFError, zlib.error) as error:
        if getattr(error, "errno", None):
            yield BadInput(str(path), "unreadable file", f"cannot be read ({error.strerror})")
        else:
            yield BadInput(str(path), "damaged file", f"damaged or cut off ({error})")


def _open(path: Path):
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")
    if path.suffix.lower() == ".zst":
        import pyarrow  # here: half a second that most runs do not need; unlike zstandard it sees a file cut off

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return open(path, "rb")


def _decode(data: bytes, place: str, *, is_file: bool = False) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        detail = f"byte 0x{data[error.start]:02x} is not UTF-8 text"
        raise BadInput(f"{place} line {line}" if is_file else place, "wrong encoding", detail) from None


def _parse_object(record: bytes, place: str) -> dict:
    try:
        value = json.loads(_decode(record, place))
    except (ValueError, RecursionError) as error:
        raise BadInput(place, "bad JSON", f"not JSON ({getattr(error, 'msg', error)})") from None
    if not isinstance(value, dict):
        raise BadInput(place, "bad JSON", f"expected a JSON object, got {type(value).__name__}")
    return value


def _parse_json(record: bytes, field: str, place: str) -> str:
    """The text field of a JSON object."""
    value = _parse_object(record, place)
    if field not in value:
        known = ", ".join(list(value)[:8]) or "none"
        raise BadInput(place, "no text field", f"no field {field!r} (data.text_field); its fields: {known}")
    text = value[field]
    if not isinstance(text, str):
        raise BadInput(place, "no text field", f"field {field!r}: expected a string, got {type(text).__name__}")
    _check_unicode(text, f"field {field!r}", place)
    return text


def _check_unicode(text: str, what: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell it
        raise BadInput(place, "wrong encoding", f"{what} holds half a surrogate pair") from None


def _parse_text(record: bytes | None, field: str, place: str) -> str:
    if record is None:
        raise BadInput(place, "no text field", f"field {field!r} is null")
    return _decode(record, place)


def _read_lines(path: Path, field: str) -> Iterator:
    """(place, record, how it is parsed), as the other readers."""
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"line {number}", line, _parse_json


def _read_parquet(path: Path, field: str) -> Iterator:
    import pyarrow  # here: half a second that most runs do not need
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                detail = f"no column {field!r} (data.text_field); its columns: {', '.join(names[:8])}"
                raise BadInput(str(path), "no text field", detail)
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=[field]):
                for record in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                    number += 1
                    yield f"row {number}", record, _parse_text
    except NotImplementedError:
        kind = file.schema_arrow.field(field).type
        raise BadInput(str(path), "no text field", f"column {field!r}: expected strings, got {kind}") from None
    except pyarrow.ArrowException as error:
        detail = f"not a whole Parquet file ({str(error).splitlines()[0]})"
        raise BadInput(str(path), "damaged file", detail) from None


def _read_arrayrecord(path: Path, field: str) -> Iterator:
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        reader = ArrayRecordReader(str(path))
        for start in range(0, reader.num_records(), 1024):
            stop = min(start + 1024, reader.num_records())
            for number, record in enumerate(reader.read(start, stop), start + 1):
                is_json = record.lstrip()[:1] == b"{"
                yield f"record {number}", record, _parse_json if is_json else _parse_text
        reader.close()
    except (RuntimeError, IndexError, ValueError) as error:
        detail = f"not a whole ArrayRecord file ({error})"
        raise BadInput(str(path), "damaged file", detail) from None


READERS = {
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".parquet": _read_parquet,
    ".array_record": _read_arrayrecord,
    ".arrayrecord": _read_arrayrecord,
}
