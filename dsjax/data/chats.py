"""Conversations as a run keeps them under data/: tokens, and which of them are learned.

`dsjax sft` writes them (dsjax.posttrain.chats makes them of records); then the run needs its .jsonl files no more.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dsjax.config import ConfigError, DataConfig
from dsjax.data.corpus import Corpus, read_facts, write_facts
from dsjax.data.documents import TokenizedDocuments
from dsjax.data.tokenizer import Tokenizer, check_vocabulary
from dsjax.files import read_json, replacing

PARTS = ("train", "heldout")
_FILES = tuple(f"{part}.{kind}" for part in PARTS for kind in ("tokens", "learned", "lengths.npy", "weights.npy"))


@dataclass(frozen=True)
class Chat:
    """A conversation as the model reads it. The first token is never predicted, whatever `learned` says."""

    tokens: np.ndarray  # [N] int32
    learned: np.ndarray  # [N] bool


def keep_chats(
    chats: Iterable[tuple[str, Chat, float]], folder: Path, fingerprint: str, facts: dict
) -> dict[str, dict[str, int]]:
    """Writes (part, conversation, weight) into a run's data/; the counts of both parts.

    The facts, the counts among them, are written last, and only if both parts have one: else nothing counts as kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "facts.json").unlink(missing_ok=True)
    lengths, weights, learned = ({part: [] for part in PARTS} for _ in range(3))
    with ExitStack() as stack:
        files = {name: stack.enter_context(replacing(folder / name)) for name in _FILES}
        for part, chat, weight in chats:
            files[f"{part}.tokens"].write(chat.tokens.astype(np.int32).tobytes())
            files[f"{part}.learned"].write(chat.learned.astype(bool).tobytes())
            lengths[part].append(len(chat.tokens))
            weights[part].append(weight)
            learned[part].append(int(chat.learned.sum()))
        for part in PARTS:
            np.save(files[f"{part}.lengths.npy"], np.array(lengths[part], np.int64))
            np.save(files[f"{part}.weights.npy"], np.array(weights[part], np.float64))
    counts = {
        part: {"documents": len(lengths[part]), "tokens": sum(lengths[part]), "learned": sum(learned[part])}
        for part in PARTS
    }
    if all(count["documents"] for count in counts.values()):
        write_facts(folder, fingerprint, _FILES, {**facts, **counts})
    return counts


def load_chats(config: DataConfig, vocab_size: int, folder: Path) -> Corpus:
    """The corpus of a run of `dsjax sft`. Raises ConfigError where its conversations are not there, or not whole."""
    folder = Path(folder)
    facts = read_facts(folder / "data", None)
    if facts is None or "learned" not in facts["train"]:
        raise ConfigError(
            f"{folder / 'data'}: no whole conversations (data.learn={config.learn}); `dsjax sft` with the same --data "
            "puts them there"
        )
    if config.packing != "best_fit" or config.fim_rate:
        raise ConfigError(
            f"data.packing={config.packing}, data.fim_rate={config.fim_rate:g}: expected best_fit and 0, as "
            "conversations stay whole"
        )
    tokenizer = Tokenizer.load(folder)
    check_vocabulary(str(folder / "tokenizer.json"), vocab_size, tokenizer)
    train, heldout = (read_part(folder / "data", part) for part in PARTS)
    if config.teacher_top_k:
        train = replace(train, teacher=_load_teacher(folder / "data", config.teacher_top_k))
    return Corpus(tokenizer, train, heldout, b"", facts)


def read_part(folder: Path, part: str) -> TokenizedDocuments:
    """The conversations of one part of a run's data/."""
    return TokenizedDocuments(
        np.memmap(folder / f"{part}.tokens", np.int32, "r"),
        np.load(folder / f"{part}.lengths.npy"),
        np.load(folder / f"{part}.weights.npy"),
        np.memmap(folder / f"{part}.learned", bool, "r"),
    )


def teacher_files(folder: Path) -> tuple[Path, Path, Path]:
    """Ids and probabilities, [learned tokens of training, K] int32 and float32, and what they are of."""
    return folder / "train.teacher_ids", folder / "train.teacher_probs", folder / "teacher.json"


def _load_teacher(folder: Path, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    ids, probs, said = teacher_files(folder)
    facts = read_json(said)
    if facts.get("top_k") != top_k or facts.get("conversations") != read_json(folder / "facts.json")["fingerprint"]:
        raise ConfigError(
            f"data.teacher_top_k={top_k}: {folder} has no teacher's probabilities of that number of tokens; "
            "`dsjax distill --logits` puts them there"
        )
    return tuple(np.memmap(path, kind, "r").reshape(-1, top_k) for path, kind in ((ids, np.int32), (probs, np.float32)))
