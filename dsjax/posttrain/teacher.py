"""What a teacher says of the tokens that a student learns: the likeliest tokens of each place, kept beside the
conversations (`dsjax distill --logits`).

    sft(student, run, [traces], teach=lambda config, folder: put_logits(teacher, config, folder))

data/train.teacher_ids and data/train.teacher_probs are [learned tokens, K]; how the student learns from them is in
dsjax.train.loss.cross_entropy.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from dsjax.config import ComputeConfig, Config, ConfigError
from dsjax.data.chats import read_part, teacher_files
from dsjax.data.tokenizer import Tokenizer
from dsjax.files import read_json, write_json
from dsjax.hub.load import Loaded
from dsjax.precision import cast_weights
from dsjax.state import Batch
from sharding.rules import constrain, spec

_SHORTEST = 64  # tokens of a row; rows are twice, four times, ... as long
_ELEMENTS = 1 << 26  # logits computed at once
_MOST_ROWS = 64


def check_tokenizer(teacher: Tokenizer, student: Tokenizer, top_k: int) -> None:
    """Raises ConfigError where the teacher's probabilities would be of other tokens than the student's."""
    ours, theirs = (t.backend.get_vocab(with_added_tokens=True) for t in (student, teacher))
    if ours != theirs:
        raise ConfigError(
            f"--logits={top_k}: expected one tokenizer of both models; the teacher's has {len(theirs):,} tokens and "
            f"the student's {len(ours):,}, of which {len(ours.items() & theirs.items()):,} are the same; without "
            "--logits the student learns the traces as text"
        )
    if top_k > len(ours):
        raise ConfigError(f"--logits={top_k}: expected at most {len(ours)}, the tokens that there are")


def put_logits(
    teacher: Loaded, config: Config, folder: Path, *, progress: bool = False, say: Callable[[str], None] = print
) -> None:
    """Writes what the teacher says of every learned token of a run's training conversations into its data/; goes on
    where a killed command stopped. Raises ConfigError for another tokenizer, and for conversations too long for it."""
    top_k, data = config.data.teacher_top_k, folder / "data"
    paths, facts = teacher_files(data)[:2], teacher_files(data)[2]
    head = {
        "top_k": top_k,
        "teacher": str(teacher.folder.absolute()),
        "conversations": read_json(data / "facts.json")["fingerprint"],
    }
    if read_json(facts) == head:
        return
    check_tokenizer(teacher.tokenizer, Tokenizer.load(folder), top_k)
    documents, longest = read_part(data, "train"), teacher.config.model.max_position_embeddings
    if documents.lengths.max() > longest:
        raise ConfigError(
            f"--logits={top_k}: a conversation has {documents.lengths.max()} tokens, and the teacher room for {longest}"
        )
    facts.unlink(missing_ok=True)
    begun = data / "teacher.part.json"
    if read_json(begun) != head:
        for path in paths:
            path.unlink(missing_ok=True)
        write_json(begun, head)
    marks = np.concatenate([[0], np.cumsum([documents.learned_of(i).sum() for i in range(len(documents))])])
    done = min((path.stat().st_size // (4 * top_k) if path.exists() else 0) for path in paths)
    first = int(np.searchsorted(marks, done, "right")) - 1  # whole conversations that are there
    if first:
        say(f"{data}: the teacher's probabilities of {first} conversations are there already")
    for path in paths:
        with path.open("ab") as file:
            file.truncate(int(marks[first]) * 4 * top_k)
    with (
        jax.set_mesh(teacher.mesh),
        open(paths[0], "ab") as ids_file,
        open(paths[1], "ab") as probs_file,
        tqdm(total=len(documents), initial=first, desc="teacher", disable=not progress, leave=False) as bar,
    ):
        i = first
        while i < len(documents):
            lengths = [_length(int(n), longest) for n in documents.lengths[i : i + _MOST_ROWS]]
            n, shape = _fitting(lengths, teacher.config.model.vocab_size)
            these = range(i, i + n)
            ids, probs = likeliest(teacher, [documents[j] for j in these], shape, top_k)
            for row, j in enumerate(these):
                places = np.nonzero(documents.learned_of(j))[0] - 1  # -1, a first token, is never predicted
                ids_file.write(ids[row, places].astype(np.int32).tobytes())
                probs_file.write(probs[row, places].astype(np.float32).tobytes())
            i = these.stop
            bar.update(len(these))
        for file in (ids_file, probs_file):
            file.flush()
            os.fsync(file.fileno())
    write_json(facts, head)
    begun.unlink()


def likeliest(
    teacher: Loaded, texts: list[np.ndarray], shape: tuple[int, int], top_k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of texts of token ids, padded to `shape`, the K likeliest tokens behind each place and their probabilities,
    [n, T, K]. Under the teacher's mesh. Ids that the tokenizer does not have are left out."""
    tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)], segments[row, : len(text)] = text, 1
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    batch = Batch(*(jax.device_put(a, spec("batch", "seq")) for a in (tokens, segments, positions)))
    run = _top(teacher.config.compute, top_k, min(teacher.tokenizer.vocab_size, teacher.config.model.vocab_size))
    ids, probs = jax.device_get(run(teacher.model, batch, teacher.router_bias))
    return ids, probs


@functools.cache
def _top(compute: ComputeConfig, top_k: int, n_tokens: int):
    def run(model, batch: Batch, router_bias) -> tuple[Int[Array, "B T K"], Float[Array, "B T K"]]:
        model = cast_weights(model, compute.precision)
        hidden = constrain(model(batch, router_bias, compute).hidden, "batch", None, None)

        def best(hidden: Float[Array, "B C D"]) -> tuple[Float[Array, "B C K"], Int[Array, "B C K"]]:
            logits = constrain(model.logits(hidden).astype(jnp.float32), "batch", None, None)[..., :n_tokens]
            return jax.lax.top_k(jax.nn.softmax(logits, axis=-1), top_k)

        b, t, d = hidden.shape
        places = min(t, max(1, _ELEMENTS // (b * model.cfg.vocab_size)))  # of which the logits are there at once
        n = -(-t // places)
        chunks = jnp.pad(hidden, ((0, 0), (0, n * places - t), (0, 0))).reshape(b, n, places, d).swapaxes(0, 1)
        probs, ids = (a.swapaxes(0, 1).reshape(b, -1, top_k)[:, :t] for a in jax.lax.map(best, chunks))
        return ids, probs

    return jax.jit(run)


def _fitting(lengths: list[int], vocab_size: int) -> tuple[int, tuple[int, int]]:
    """How many of the first conversations go together, and rows and tokens of their batch: no more logits than
    _ELEMENTS, but for one conversation alone."""

    def rows(length: int) -> int:  # a power of two, so that few programs are compiled
        return 1 << (max(1, min(_ELEMENTS // (length * vocab_size), _MOST_ROWS)).bit_length() - 1)

    n, longest = 1, lengths[0]
    for length in lengths[1:]:
        if rows(max(longest, length)) <= n:
            break
        n, longest = n + 1, max(longest, length)
    return n, (rows(longest), longest)


def _length(n: int, longest: int) -> int:
    return min(longest, max(_SHORTEST, 1 << (n - 1).bit_length()))
