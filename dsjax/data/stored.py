"""A run on shards: its tokenizer into the run folder, its held-out documents into memory, and the facts about them."""

import json
import platform
from pathlib import Path

import numpy as np

from dsjax.config import ConfigError, DataConfig
from dsjax.data.blocks import BadShard
from dsjax.data.corpus import Corpus, digest
from dsjax.data.documents import TokenizedDocuments
from dsjax.data.manifest import load_manifest, load_tokenizer, stored_sources, tokenizer_digest
from dsjax.data.places import ShardCache
from dsjax.data.tokenizer import Tokenizer, bytes_tokenizer, check_vocabulary
from dsjax.data.windows import Stored
from dsjax.files import read_json, replacing

HELDOUT_TOKENS = 1 << 24  # of a folder; what is more is not read


def load_stored(config: DataConfig, vocab_size: int | None, folder: Path | None, *, make: bool = True) -> Corpus | None:
    """The corpus of a run whose data.sources are folders of shards; None if they are text.

    The run folder gets the tokenizer of the shards and, where it has one, must have the same. Raises ConfigError for
    shards of several tokenizers, for one that the configuration does not name, and for a vocabulary that does not fit.
    """
    found = stored_sources(config.sources)
    if found is None:
        return None
    stored = [Stored(place, load_manifest(place), weight) for place, weight in found]
    first = stored[0]
    for other in stored[1:]:
        if other.manifest.tokenizer["sha256"] != first.manifest.tokenizer["sha256"]:
            raise ConfigError(
                f"data.sources={','.join(config.sources)}: {first.place} and {other.place} have different tokenizers; "
                "expected shards of one, so build them again with the same --tokenizer"
            )
    for s in stored:
        if config.split_rate and s.manifest.split_rate != config.split_rate:
            raise ConfigError(
                f"data.split_rate={config.split_rate}: {s.place} was built with {s.manifest.split_rate}; expected "
                "that, or 0 (tokens are split when shards are built)"
            )
    tokenizer = load_tokenizer(first.place, first.manifest)
    if vocab_size is not None:
        check_vocabulary(str(first.place), vocab_size, tokenizer, config.fim_rate)
    if folder is not None:
        _keep_tokenizer(config, tokenizer, Path(folder), make)
    heldout, n_bytes = _heldout(stored, ShardCache(config.cache, config.cache_gib))
    nothing = TokenizedDocuments(np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0))
    return Corpus(tokenizer, nothing, heldout, b"", _facts(config, stored, tokenizer, heldout, n_bytes), tuple(stored))


def _keep_tokenizer(config: DataConfig, tokenizer: Tokenizer, folder: Path, make: bool) -> None:
    """The shards' tokenizer in the run folder. Raises ConfigError where the run has, or asks for, another."""
    wanted, ours = tokenizer_digest(tokenizer), f"data.sources={','.join(config.sources)}"
    if config.tokenizer not in ("bpe", "run"):  # bpe is what presets have
        asked = bytes_tokenizer() if config.tokenizer == "bytes" else Tokenizer.load(Path(config.tokenizer))
        if tokenizer_digest(asked) != wanted:
            raise ConfigError(f"data.tokenizer={config.tokenizer}: not the one of {ours}; leave it out to take that")
    if (folder / "tokenizer.json").exists() and (
        config.tokenizer == "run" or read_json(folder / "data" / "tokenizer.from.json").get("from") is not None
    ):
        if tokenizer_digest(Tokenizer.load(folder)) != wanted:
            raise ConfigError(
                f"{folder / 'tokenizer.json'}: not the tokenizer of {ours}; choose another --run, or shards that were "
                f"built with --tokenizer={folder}"
            )
        return
    if config.tokenizer == "run":
        raise ConfigError(f"{folder / 'tokenizer.json'}: missing; data.tokenizer=run expects it in the run folder")
    if not make:
        raise ConfigError(f"{folder / 'tokenizer.json'}: missing; expected a run folder that all processes share")
    (folder / "data").mkdir(parents=True, exist_ok=True)
    files = {**tokenizer.beside(), "tokenizer.json": tokenizer.dumps()}
    for name, text in files.items():
        with replacing(folder / name) as file:
            file.write(text.encode())
    sha256 = digest(files["tokenizer.json"].encode())
    with replacing(folder / "data" / "tokenizer.from.json") as file:
        file.write(json.dumps({"from": {"tokenizer": "shards", "sha256": wanted}, "sha256": sha256}).encode())


def _heldout(stored: list[Stored], cache: ShardCache) -> tuple[TokenizedDocuments, list[int]]:
    """Held-out documents of all folders, whole shards until HELDOUT_TOKENS of each; and the bytes of each folder's."""
    tokens, lengths, n_bytes = [], [], []
    for s in stored:
        taken, size = 0, 0
        for shard in s.manifest.heldout:
            try:
                reader = cache.open(s.place, shard)
                tokens += [a.astype(np.int32) for a in reader.read(list(range(shard.blocks)))]
            except BadShard as error:
                raise ConfigError(
                    f"{s.place.name(shard.name)}: {error}; copy it again or build the folder again"
                ) from None
            lengths.append(reader.lengths)
            taken, size = taken + shard.tokens, size + shard.bytes
            if taken >= HELDOUT_TOKENS:
                break
        n_bytes.append(size)
    lengths = np.concatenate(lengths)
    return TokenizedDocuments(np.concatenate(tokens), lengths, np.ones(len(lengths))), n_bytes


def _facts(config: DataConfig, stored: list[Stored], tokenizer: Tokenizer, heldout, n_bytes: list[int]) -> dict:
    totals = [s.manifest.total("train") for s in stored]
    train = {name: sum(t[name] for t in totals) for name in ("documents", "bytes", "tokens")}
    skipped: dict[str, int] = {}
    for s in stored:
        for reason, count in s.manifest.skipped.items():
            skipped[reason] = skipped.get(reason, 0) + count
    text = " ".join(f"{s.manifest.digest} {s.weight}" for s in stored)
    part = {"documents": len(heldout), "bytes": sum(n_bytes), "tokens": int(heldout.lengths.sum())}
    compressed = {
        name: sum(getattr(s.manifest, name) * n for s, n in zip(stored, n_bytes)) / sum(n_bytes)
        for name in ("gzip_bpb", "xz_bpb")
    }
    return {
        "python": platform.python_version(),
        "sha256": stored[0].manifest.digest if len(stored) == 1 else digest(text.encode()),
        "sources": list(config.sources),
        "train": train,
        "heldout": part,
        "skipped": skipped,
        "tokenizer": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "bytes_per_token": train["bytes"] / train["tokens"],
        **compressed,
    }
