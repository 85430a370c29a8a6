"""Folders here or behind a URL (gs://, s3://, ... through fsspec), and shards brought from there, each verified once.

A shard on this machine is read where it lies. One from afar is fetched into a cache folder under its digest; of what
nobody reads the longest unused gives way where the folder grows beyond its size.
"""

import contextlib
import hashlib
import os
import threading
import time
import uuid
from collections import Counter
from pathlib import Path

from dsjax.config import ConfigError
from dsjax.data.blocks import BadShard, Shard, ShardReader, file_state
from dsjax.files import replacing

CHUNK = 1 << 23
TRIES, WAIT_S = 4, 1.0  # of a fetch that fails; each wait is twice the last
INSTALL = {
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "s3": "s3fs",
    "s3a": "s3fs",
    "az": "adlfs",
    "abfs": "adlfs",
    "hf": "huggingface-hub",
}


def is_url(text: str) -> bool:
    return "://" in text


class Place:
    """A folder of files, here (`local` is its path) or behind a URL."""

    def __init__(self, url: str):
        self.url = url.rstrip("/") or url
        self.local = None if is_url(url) else Path(url).expanduser()
        if self.local is not None:
            return
        import fsspec  # here: most runs need none

        protocol = url.partition("://")[0]
        try:
            self.fs, self.root = fsspec.core.url_to_fs(self.url)
        except ImportError:
            package = INSTALL.get(protocol, f"the fsspec package of {protocol}")
            raise ConfigError(f"{url}: {protocol}:// needs a package; `pip install {package}`") from None
        except ValueError as error:
            raise ConfigError(
                f"{url}: {str(error).splitlines()[0]}; expected a path, gs://, s3:// or the like"
            ) from None

    def __str__(self) -> str:
        return self.url

    def name(self, file: str) -> str:
        return f"{self.url}/{file}"

    def exists(self, file: str) -> bool:
        with _plain_errors(self.name(file)):
            return (self.local / file).is_file() if self.local else self.fs.exists(f"{self.root}/{file}")

    def read(self, file: str) -> bytes:
        """A small file, whole. Raises ConfigError where it cannot be read."""
        with _plain_errors(self.name(file)):
            return (self.local / file).read_bytes() if self.local else self.fs.cat_file(f"{self.root}/{file}")

    def write(self, file: str, data: bytes) -> None:
        """A small file, whole or not at all."""
        with _plain_errors(self.name(file)):
            if self.local is None:
                self.fs.pipe_file(f"{self.root}/{file}", data)
                return
            with replacing(self.local / file) as out:
                out.write(data)

    def put(self, draft: Path, file: str) -> None:
        """Moves a whole local file here."""
        with _plain_errors(self.name(file)):
            if self.local is None:
                self.fs.put_file(str(draft), f"{self.root}/{file}")
                draft.unlink()
            else:
                os.replace(draft, self.local / file)

    def remove(self, file: str) -> None:
        with _plain_errors(self.name(file)):
            if self.local is not None:
                (self.local / file).unlink(missing_ok=True)
            elif self.fs.exists(f"{self.root}/{file}"):
                self.fs.rm_file(f"{self.root}/{file}")

    def make(self) -> None:
        with _plain_errors(self.url):
            self.local.mkdir(parents=True, exist_ok=True) if self.local else self.fs.makedirs(self.root, exist_ok=True)

    def files(self) -> list[str]:
        with _plain_errors(self.url):
            if self.local is not None:
                return sorted(path.name for path in self.local.iterdir()) if self.local.is_dir() else []
            if not self.fs.exists(self.root):
                return []
            return sorted(path.rstrip("/").rpartition("/")[2] for path in self.fs.ls(self.root, detail=False))

    def digest(self, file: str, copy: Path | None = None) -> tuple[str, int]:
        """sha256 and size of a file, read through once, and copied to `copy` on the way. Raises OSError."""
        sha, size = hashlib.sha256(), 0
        path = self.local / file if self.local else f"{self.root}/{file}"
        with (
            path.open("rb") if self.local else self.fs.open(path, "rb") as source,
            open(copy, "wb") if copy else contextlib.nullcontext() as out,
        ):
            while data := source.read(CHUNK):
                sha.update(data)
                size += len(data)
                if out is not None:
                    out.write(data)
        return sha.hexdigest(), size


class ShardCache:
    """Gives shards as files on this machine whose sha256 has been seen to be right."""

    def __init__(self, folder: str | None, size_gib: float):
        self.folder = Path(folder).expanduser() if folder else Path.home() / ".cache" / "dsjax" / "shards"
        self.limit = int(size_gib * 2**30)
        self.lock = threading.Lock()
        self.busy: dict[str, threading.Lock] = {}  # a shard is fetched and verified by one thread
        self.held: Counter[str] = Counter()  # digests of the shards that somebody reads
        self.doing: dict[int, str] = {}  # thread -> what it waits for

    def get(self, place: Place, shard: Shard) -> tuple[Path, tuple[int, int]]:
        """The file, and its size and time of change when it was verified. Raises BadShard if it is not as built."""
        with self.lock:
            busy = self.busy.setdefault(f"{place}/{shard.name}", threading.Lock())
        with self.waiting(f"shard {place.name(shard.name)}"), busy:
            return self._verified(place, shard) if place.local else self._fetched(place, shard)

    def open(self, place: Place, shard: Shard) -> ShardReader:
        """A reader of the shard. Raises BadShard if it is not as built."""
        path, state = self.get(place, shard)
        return ShardReader(path, shard, state)

    @contextlib.contextmanager
    def waiting(self, what: str):
        """Names what this thread waits for while it does."""
        me = threading.get_ident()
        before = self.doing.get(me)
        self.doing[me] = what
        try:
            yield
        finally:
            self.doing.pop(me) if before is None else self.doing.update({me: before})

    def _verified(self, place: Place, shard: Shard) -> tuple[Path, tuple[int, int]]:
        path = place.local / shard.name
        state = file_state(path)
        if state[0] != shard.size:
            raise BadShard(f"{state[0]} bytes, expected {shard.size}")
        if self._note(path).exists() and _read(self._note(path)) == _seen(state, shard):
            return path, state
        try:
            sha256, _ = place.digest(shard.name)
        except OSError as error:
            raise BadShard(f"cannot be read ({error.strerror or error})") from None
        if sha256 != shard.sha256:
            raise BadShard(f"sha256 {sha256[:12]}, expected {shard.sha256[:12]}")
        if file_state(path) != state:
            raise BadShard("changed while it was read")
        self._remember(path, state, shard)
        return path, state

    def _fetched(self, place: Place, shard: Shard) -> tuple[Path, tuple[int, int]]:
        target = self.folder / f"{shard.sha256}.array_record"
        with contextlib.suppress(BadShard):
            state = file_state(target)
            if state[0] == shard.size and _read(self._note(target)) == _seen(state, shard):
                os.utime(target, ns=(time.time_ns(), state[1]))  # the newest in use; its time of change stays
                return target, state
        self.folder.mkdir(parents=True, exist_ok=True)
        self._make_room(shard.size)
        draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
        try:
            for turn in range(TRIES):
                try:
                    sha256, size = place.digest(shard.name, draft)
                    break
                except FileNotFoundError:
                    raise BadShard("no such file") from None
                except Exception as error:  # each file system has its own
                    if turn + 1 == TRIES:
                        text = " ".join(str(error).split())[:200]
                        raise BadShard(f"cannot be fetched in {TRIES} tries ({type(error).__name__}: {text})") from None
                    time.sleep(WAIT_S * 2**turn)
            if (sha256, size) != (shard.sha256, shard.size):
                found = f"{size} bytes, sha256 {sha256[:12]}"
                raise BadShard(f"{found}, expected {shard.size} bytes, sha256 {shard.sha256[:12]}")
            os.replace(draft, target)
        finally:
            draft.unlink(missing_ok=True)
        state = file_state(target)
        self._remember(target, state, shard)
        return target, state

    def hold(self, shards: list[Shard], by: int = 1) -> None:
        """Shards that stay, until they are held `by=-1`."""
        with self.lock:
            for shard in shards:
                self.held[f"{shard.sha256}.array_record"] += by

    def _make_room(self, size: int) -> None:
        with self.lock:
            files = []
            for path in self.folder.glob("*.array_record"):
                with contextlib.suppress(OSError):  # another process was faster
                    stat = path.stat()
                    files.append((stat.st_atime_ns, stat.st_size, path))
            total = sum(file_size for _, file_size, _ in files) + size
            for _, file_size, path in sorted(files):
                if total > self.limit and self.held[path.name] <= 0:
                    path.unlink(missing_ok=True)
                    self._note(path).unlink(missing_ok=True)
                    total -= file_size
            for leftover in self.folder.glob(".*.tmp"):
                with contextlib.suppress(OSError):
                    if time.time() - leftover.stat().st_mtime > 3600:  # of a killed process
                        leftover.unlink()

    def _note(self, path: Path) -> Path:
        return self.folder / "verified" / hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:32]

    def _remember(self, path: Path, state: tuple[int, int], shard: Shard) -> None:
        note = self._note(path)
        with contextlib.suppress(OSError):  # then it is verified again next time
            note.parent.mkdir(parents=True, exist_ok=True)
            draft = note.with_name(f"{note.name}.{uuid.uuid4().hex}")
            draft.write_text(_seen(state, shard))
            os.replace(draft, note)


def _seen(state: tuple[int, int], shard: Shard) -> str:
    return f"{state[0]} {state[1]} {shard.sha256}"


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


@contextlib.contextmanager
def _plain_errors(name: str):
    """What a file system of afar raises, as a ConfigError of one line."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{name}: {error.strerror or ' '.join(str(error).split()) or type(error).__name__}") from None
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{name}: cannot be reached ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        ) from None
