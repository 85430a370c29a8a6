"""The corpus of a run: its tokenizer, its training and held-out documents as token ids, and the facts about them.

Kept in the run folder: tokenizer.json, and under data/ what takes long to make. Each file is written under another
name and renamed, the list of them with their digests last, so a killed process leaves nothing that looks whole.
"""

import gzip
import hashlib
import json
import lzma
import platform
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dsjax.config import ConfigError, DataConfig
from dsjax.data.documents import TokenizedDocuments, uniforms
from dsjax.data.sources import Document, read_documents
from dsjax.data.split import split_table, split_tokens
from dsjax.data.tokenizer import Tokenizer, bytes_tokenizer, check_vocabulary, train_bpe
from dsjax.files import read_json, replacing

BPE_BYTES = 1 << 28  # a larger corpus trains its tokenizer on documents drawn to about this size
ENCODE_BYTES = 1 << 20  # text encoded at a time


@dataclass(frozen=True)
class Corpus:
    """What a run reads. `facts` goes with every result."""

    tokenizer: Tokenizer
    train: TokenizedDocuments
    heldout: TokenizedDocuments
    heldout_text: bytes
    facts: dict
    stored: tuple = ()  # of folders of shards: `train` is empty then, and the held-out text is not kept


@dataclass(frozen=True)
class Survey:
    """What one pass over the sources tells, before any token."""

    sha256: str  # of all texts in order
    n_bytes: np.ndarray  # [documents] int64
    weights: np.ndarray  # [documents] float64
    heldout: np.ndarray  # [documents] bool
    cut: int | None  # where the only document is cut into a training and a held-out one
    skipped: dict[str, int]


def load_corpus(
    config: DataConfig, vocab_size: int, folder: Path, *, seed: int = 0, progress: bool = True, make: bool = True
) -> Corpus:
    """The corpus of the run in `folder`: made at the first call, read back at later ones, the same each time.

    Training and held-out documents depend on the text alone; `seed` only draws what a tokenizer is trained on where
    the corpus is larger than BPE_BYTES, and which tokens data.split_rate splits. Raises ConfigError for input that
    cannot be read, for a vocabulary that does not fit, where `folder` holds the tokenizer of another corpus and,
    without `make`, where it does not hold this one.
    """
    folder = Path(folder)
    if config.tokenizer in ("bpe", "bytes"):
        check_vocabulary(config.tokenizer, vocab_size)
    survey = survey_sources(config)
    if make:
        (folder / "data").mkdir(parents=True, exist_ok=True)
    for leftover in folder.rglob("*.tmp") if make else ():
        if time.time() - leftover.stat().st_mtime > 600:  # of a killed process, not of one at work beside us
            leftover.unlink(missing_ok=True)
    tokenizer = _tokenizer(config, vocab_size, folder, survey, seed, progress) if make else Tokenizer.load(folder)
    check_vocabulary(config.tokenizer, vocab_size, tokenizer, config.fim_rate)
    made_of = f"{_fingerprint(survey)} {survey.weights.tolist()} {tokenizer.dumps()}"
    made_of += f" split {config.split_rate} {seed}" if config.split_rate else ""
    fingerprint = digest(made_of.encode())
    facts = read_facts(folder / "data", fingerprint)
    if facts is None and not make:
        raise ConfigError(
            f"{folder / 'data'}: not the tokens of data.sources={','.join(config.sources)}; expected the same text, "
            f"Python ({platform.python_version()} here) and run folder for all processes"
        )
    if facts is None:
        facts = _encode(config, folder / "data", survey, tokenizer, fingerprint, seed, progress)
    train, heldout = (
        TokenizedDocuments(
            np.memmap(folder / "data" / f"{part}.tokens", np.int32, "r"),
            np.load(folder / "data" / f"{part}.lengths.npy"),
            survey.weights[survey.heldout == (part == "heldout")],
        )
        for part in ("train", "heldout")
    )
    return Corpus(tokenizer, train, heldout, (folder / "data" / "heldout.txt").read_bytes(), facts)


def compressors_bpb(text: bytes) -> dict[str, float]:
    """Bits a byte of text under gzip -9 and xz -9."""
    return {
        "gzip_bpb": 8 * len(gzip.compress(text, 9, mtime=0)) / len(text),
        "xz_bpb": 8 * len(lzma.compress(text, preset=9)) / len(text),
    }


def survey_sources(config: DataConfig) -> Survey:
    """Sizes, digest and held-out documents of the sources.

    A document is held out if the hash of its key is below heldout_fraction; where that leaves one side empty, the
    nearest document moves there. A corpus of one document gives its tail, from a line break on.
    """
    skipped, sha = Counter(), hashlib.sha256()
    n_bytes, weights, scores, text = [], [], [], ""
    for document in read_documents(config, skipped):
        text = document.text
        data = text.encode()
        sha.update(data + b"\0")
        n_bytes.append(len(data))
        weights.append(document.weight)
        scores.append(heldout_score(document.key))
    if not scores:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "nothing there"
        raise ConfigError(f"data.sources={','.join(config.sources)}: no text in them ({reasons})")
    cut = None
    if len(scores) == 1:
        cut = _cut(config, text)
        n_bytes = [len(text[:cut].encode()), len(text[cut:].encode())]
        weights, scores = weights * 2, [1.0, 0.0]
    scores = np.array(scores)
    heldout = scores < config.heldout_fraction
    heldout[scores.argmin()] = True
    if heldout.all():
        heldout[scores.argmax()] = False
    if np.array(weights)[~heldout].sum() < 1:
        raise ConfigError(
            f"data.sources={','.join(config.sources)}: the weights leave less than one training document in an epoch"
        )
    return Survey(sha.hexdigest(), np.array(n_bytes), np.array(weights), heldout, cut, dict(skipped))


def heldout_score(key: str) -> float:
    """In [0, 1): a document is held out where this is below heldout_fraction."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def _cut(config: DataConfig, text: str) -> int:
    """Where a corpus of one document ends its training part: a line break, or else a space."""
    at = int(len(text) * (1 - config.heldout_fraction))
    for mark in ("\n", " "):
        cut = text.rfind(mark, 0, at) + 1
        if text[:cut].strip() and text[cut:].strip():
            return cut
    raise ConfigError(
        f"data.sources={','.join(config.sources)}: one document of {len(text)} characters is too short to be split "
        "into training and held-out text"
    )


def surveyed_documents(config: DataConfig, survey: Survey) -> Iterator[Document]:
    """The documents that the survey counted."""
    for document in read_documents(config, Counter()):
        if survey.cut is None:
            yield document
        else:
            yield replace(document, text=document.text[: survey.cut])
            yield replace(document, text=document.text[survey.cut :])


def _tokenizer(
    config: DataConfig, vocab_size: int, folder: Path, survey: Survey, seed: int, progress: bool
) -> Tokenizer:
    """The run's tokenizer: the one in its folder, or a new one that is then kept there."""
    if config.tokenizer == "run":
        return Tokenizer.load(folder)
    path, note = folder / "tokenizer.json", folder / "data" / "tokenizer.from.json"
    wanted = {"tokenizer": config.tokenizer}
    if config.tokenizer == "bpe":
        wanted |= {"vocab_size": vocab_size, "text": _fingerprint(survey)}
    made = read_json(note)
    if path.is_file() and made.get("sha256") == digest(path.read_bytes()):
        if made.get("from") == wanted:
            return Tokenizer.load(path)
        raise ConfigError(
            f"{path}: made from other text (the sources or Python have changed), or with another data.tokenizer or "
            f"model.vocab_size; choose another --run, or delete it and {folder / 'data'} (checkpoints of this run "
            "will not fit the new one)"
        )
    if config.tokenizer == "bpe":
        rate = BPE_BYTES / survey.n_bytes[~survey.heldout].sum()
        chosen = ~survey.heldout & ((uniforms(len(survey.heldout), seed) < rate) | (rate >= 1))
        documents = zip(surveyed_documents(config, survey), chosen)
        tokenizer = train_bpe((d.text for d, wanted in documents if wanted), vocab_size, progress=progress)
    elif config.tokenizer == "bytes":
        tokenizer = bytes_tokenizer()
    else:
        tokenizer = Tokenizer.load(Path(config.tokenizer))
    data = tokenizer.dumps().encode()
    for name, text in tokenizer.beside().items():
        with replacing(folder / name) as file:
            file.write(text.encode())
    with replacing(path) as file:
        file.write(data)
    with replacing(note) as file:
        file.write(json.dumps({"from": wanted, "sha256": digest(data)}).encode())
    return tokenizer


def _encode(
    config: DataConfig,
    folder: Path,
    survey: Survey,
    tokenizer: Tokenizer,
    fingerprint: str,
    seed: int,
    progress: bool,
) -> dict:
    """Writes the token ids and the held-out text; returns the facts, which it writes last."""
    bar = tqdm(total=int(survey.n_bytes.sum()), desc="Encode", unit="B", unit_scale=True, disable=not progress)
    parts, heldout_text = {}, b""
    for part in ("train", "heldout"):
        n_bytes, lengths = 0, []
        chosen = survey.heldout == (part == "heldout")
        rate = config.split_rate if part == "train" else 0.0
        table = split_table(tokenizer) if rate else None
        documents = (d for d, wanted in zip(surveyed_documents(config, survey), chosen) if wanted)
        with replacing(folder / f"{part}.tokens") as file:
            for batch in batched(documents, ENCODE_BYTES):
                for document, ids in zip(batch, tokenizer.encode_batch([d.text for d in batch])):
                    ids = np.array(ids, np.int32)
                    ids = split_tokens(ids, table, rate, seed, document.key) if rate else ids
                    file.write(ids.tobytes())
                    lengths.append(len(ids))
                data = "".join(d.text for d in batch).encode()
                n_bytes += len(data)
                heldout_text += data if part == "heldout" else b""
                bar.update(len(data))
        with replacing(folder / f"{part}.lengths.npy") as file:
            np.save(file, np.array(lengths, np.int64))
        parts[part] = {"documents": len(lengths), "bytes": n_bytes, "tokens": int(sum(lengths))}
    bar.close()
    with replacing(folder / "heldout.txt") as file:
        file.write(heldout_text)
    n_tokens = parts["train"]["tokens"] + parts["heldout"]["tokens"]
    facts = {
        "python": platform.python_version(),
        "sha256": survey.sha256,
        "sources": list(config.sources),
        **parts,
        "skipped": survey.skipped,
        "tokenizer": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "bytes_per_token": int(survey.n_bytes.sum()) / n_tokens,
        **compressors_bpb(heldout_text),
    }
    names = ("train.tokens", "train.lengths.npy", "heldout.tokens", "heldout.lengths.npy", "heldout.txt")
    write_facts(folder, fingerprint, names, facts)
    return facts


def write_facts(folder: Path, fingerprint: str, names: Sequence[str], facts: dict) -> None:
    """The last file of a cache: what it is of, the digests of its files, and facts about them."""
    digests = {name: _file_digest(folder / name) for name in names}
    with replacing(folder / "facts.json") as file:
        file.write(json.dumps({"fingerprint": fingerprint, "files": digests, "facts": facts}, indent=1).encode())


def read_facts(folder: Path, fingerprint: str | None) -> dict | None:
    """The facts of a whole cache of this corpus (None: of any), else None."""
    kept = read_json(folder / "facts.json")
    if fingerprint not in (None, kept.get("fingerprint")) or not isinstance(kept.get("facts"), dict):
        return None
    whole = all(_file_digest(folder / name) == sha256 for name, sha256 in kept["files"].items())
    return kept["facts"] if whole else None


def batched(documents: Iterator[Document], size: int) -> Iterator[list[Document]]:
    batch, total = [], 0
    for document in documents:
        batch.append(document)
        total += len(document.text)
        if total >= size:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def _fingerprint(survey: Survey) -> str:
    """What decides which text is trained on."""
    return digest(f"{survey.sha256} {survey.cut} ".encode() + np.packbits(survey.heldout).tobytes())


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _file_digest(path: Path) -> str | None:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
