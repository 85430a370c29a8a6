"""Tokens a second out of shards: dsjax's packed rows against the same documents through plain Grain.

    python -m benchmarks.data_reading --out benchmarks/results/data_reading.json

The standard library's sources, one byte a token, are written twice: as a folder of `dsjax data build`, and as one
ArrayRecord file with a record a document, as Grain's own documentation has it. Measured are (1) dsjax's rows of 4,096
in batches of 16, shuffled and packed; (2) Grain's shuffled documents as they are, nothing packed; (3) those through
Grain's own packer into rows of 4,096. Each reads whole epochs in this process with two threads; the sides take turns,
and the best turn counts. The first row of dsjax is timed apart: it opens and packs a window.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import grain
import numpy as np

from benchmarks import common

SEQ_LEN, BATCH, EPOCHS, TURNS = 4096, 16, 3, 5
READ = grain.ReadOptions(num_threads=common.THREADS, prefetch_buffer_size=4 * common.THREADS)


def write_plain(folder: Path, stored) -> Path:
    """The training documents of the shards, a record each."""
    from array_record.python.array_record_module import ArrayRecordWriter

    from dsjax.data.places import ShardCache

    writer = ArrayRecordWriter(str(folder / "plain.array_record"), "group_size:1")
    for shard in stored.manifest.train:
        reader = ShardCache(str(folder / "cache"), 1).open(stored.place, shard)
        tokens = np.concatenate(reader.read(list(range(shard.blocks))))
        for document in np.split(tokens, np.cumsum(reader.lengths)[:-1]):
            writer.write(document.astype(np.int32).tobytes())
    writer.close()
    return folder / "plain.array_record"


def ours(corpus, config) -> dict:
    from dsjax.data.pipeline import batches, train_rows

    rows = train_rows(corpus, config, SEQ_LEN, 0)
    start = time.perf_counter()
    rows[0]
    first = time.perf_counter() - start
    steps = EPOCHS * rows.sources[0].rows_an_epoch // BATCH
    read = batches(rows, lambda s: (BATCH * s, BATCH * s + BATCH), 0, steps, threads=common.THREADS)
    start, tokens = time.perf_counter(), 0
    for _, arrays in read:
        tokens += int((arrays["segment_ids"] > 0).sum())
    seconds = time.perf_counter() - start
    return {"tokens_per_s": tokens / seconds, "first_row_s": first, "tokens": tokens}


def plain(path: Path, packed: bool) -> dict:
    source = grain.sources.ArrayRecordDataSource(str(path))
    dataset = grain.MapDataset.source(source).shuffle(seed=0).repeat(EPOCHS)
    dataset = dataset.map(lambda record: {"tokens": np.frombuffer(record, np.int32)})
    documents = dataset.to_iter_dataset(READ)
    if packed:
        documents = grain.experimental.ConcatThenSplitIterDataset(documents, length_struct={"tokens": SEQ_LEN})
        documents = documents.batch(BATCH)
    start, tokens = time.perf_counter(), 0
    for item in documents:
        tokens += item["tokens"].size
    return {"tokens_per_s": tokens / (time.perf_counter() - start), "tokens": tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    from dsjax.config import DataConfig
    from dsjax.data.build import build
    from dsjax.data.stored import load_stored

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        build(["stdlib"], str(folder / "shards"), workers=common.THREADS, progress=False)
        config = DataConfig(sources=(str(folder / "shards"),), packing="best_fit", cache=str(folder / "cache"))
        corpus = load_stored(config, None, None)
        path = write_plain(folder, corpus.stored[0])
        sides = {
            "dsjax_packed_rows": lambda: ours(corpus, config),
            "grain_documents": lambda: plain(path, False),
            "grain_concat_rows": lambda: plain(path, True),
        }
        found: dict[str, list[dict]] = {name: [] for name in sides}
        for _ in range(TURNS):
            for name, side in sides.items():
                found[name].append(side())
    best = {name: max(turns, key=lambda turn: turn["tokens_per_s"]) for name, turns in found.items()}
    best["dsjax_packed_rows"]["first_row_s"] = min(turn["first_row_s"] for turn in found["dsjax_packed_rows"])
    settings = {"seq_len": SEQ_LEN, "batch": BATCH, "epochs": EPOCHS, "turns": TURNS}
    report = {"command": "python -m benchmarks.data_reading", "machine": common.machine(), **settings, **best}
    text = json.dumps(report, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
