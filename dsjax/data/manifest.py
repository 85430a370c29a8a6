"""manifest.json: what a folder of shards is. It is written last, so a folder that has one is whole."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsjax.config import ConfigError, show
from dsjax.data.blocks import BadShard, Shard, file_state
from dsjax.data.places import Place, is_url
from dsjax.data.sources import parse_source
from dsjax.data.tokenizer import TOKENIZER_FILES, Tokenizer

MANIFEST, UNFINISHED = "manifest.json", "build.json"
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a build made, and of what."""

    format: int
    dsjax: str  # version
    sources: tuple[str, ...]
    text_sha256: str  # of all texts in order
    seed: int
    split_rate: float
    heldout_fraction: float
    tokenizer: dict[str, Any]  # kind, vocab_size, sha256
    skipped: dict[str, int]
    gzip_bpb: float
    xz_bpb: float
    train: tuple[Shard, ...]
    heldout: tuple[Shard, ...]

    def total(self, part: str) -> dict[str, int]:
        """Documents, bytes of text and tokens of "train" or "heldout"."""
        shards = getattr(self, part)
        return {name: sum(getattr(s, name) for s in shards) for name in ("documents", "bytes", "tokens")}

    @property
    def digest(self) -> str:
        """Of what a run sees: two folders with the same one hold the same tokens."""
        return hashlib.sha256(" ".join(s.sha256 for s in (*self.train, *self.heldout)).encode()).hexdigest()

    def dumps(self) -> bytes:
        values = dataclasses.asdict(self)
        return (json.dumps(values | {"manifest_sha256": _digest(values)}, indent=1, ensure_ascii=False) + "\n").encode()


def load_manifest(place: Place) -> Manifest:
    """Raises ConfigError where there is none, or one that is damaged or of another version."""
    name = place.name(MANIFEST)
    try:
        values = json.loads(place.read(MANIFEST))
        sha256, found = values.pop("manifest_sha256"), values["format"]
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ConfigError(f"{name}: damaged, or no manifest of `dsjax data build`; build the folder again") from None
    if found != FORMAT:
        raise ConfigError(f"{name}: format {show(found)}, expected {FORMAT}; build the folder again")
    if sha256 != _digest(values):
        raise ConfigError(f"{name}: not as it was written; copy it again, or build the folder again")
    for part in ("train", "heldout"):
        values[part] = tuple(Shard(**shard) for shard in values[part])
    return Manifest(**values | {"sources": tuple(values["sources"])})


def load_tokenizer(place: Place, manifest: Manifest) -> Tokenizer:
    """The tokenizer that lies beside the manifest, in a folder of its own. Raises ConfigError for another one."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for name in TOKENIZER_FILES:
            if place.exists(name):
                (Path(folder) / name).write_bytes(place.read(name))
        if not (Path(folder) / "tokenizer.json").exists():
            raise ConfigError(f"{place.name('tokenizer.json')}: missing; copy it again, or build the folder again")
        tokenizer = Tokenizer.load(Path(folder))
    if tokenizer_digest(tokenizer) != manifest.tokenizer["sha256"]:
        raise ConfigError(
            f"{place.name('tokenizer.json')}: not the one of the manifest; copy or build the folder again"
        )
    return tokenizer


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    return hashlib.sha256((tokenizer.dumps() + json.dumps(tokenizer.beside(), sort_keys=True)).encode()).hexdigest()


def stored_sources(sources: Sequence[str]) -> list[tuple[Place, float]] | None:
    """Folder of shards and weight of each source; None where they are all text.

    Raises ConfigError for a mixture of both, and for a folder whose build has not ended.
    """
    found = [_stored(source) for source in sources]
    if None not in found:
        return found
    for place, _ in filter(None, found):
        raise ConfigError(
            f"data.sources={','.join(sources)}: {place} is a folder of shards and the rest is not; expected shards "
            "alone (`dsjax data build` makes them) or text alone"
        )
    return None


def _stored(source: str) -> tuple[Place, float] | None:
    path, weight = parse_source(source)
    if not is_url(path) and not Path(path).expanduser().is_dir():
        return None
    place = Place(path)
    if place.exists(MANIFEST):
        return place, weight
    if place.exists(UNFINISHED):
        raise ConfigError(f"{path}: its build has not ended; `dsjax data build` with the same options goes on with it")
    if is_url(path):
        raise ConfigError(f"{path}: no {MANIFEST} there; expected a folder that `dsjax data build` made")
    return None


def verify(place: Place, manifest: Manifest, progress=iter) -> list[str]:
    """A line for each shard that is not what the manifest says; every byte is read."""
    wrong = []
    for shard in progress([*manifest.train, *manifest.heldout]):
        try:
            if place.local:
                file_state(place.local / shard.name)
            sha256, size = place.digest(shard.name)
        except (OSError, BadShard) as error:
            wrong.append(f"{place.name(shard.name)}: {getattr(error, 'strerror', None) or error}")
            continue
        if (sha256, size) != (shard.sha256, shard.size):
            expected = f"expected {shard.size} bytes, sha256 {shard.sha256[:12]}"
            wrong.append(f"{place.name(shard.name)}: {size} bytes, sha256 {sha256[:12]}; {expected}")
    return wrong


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
