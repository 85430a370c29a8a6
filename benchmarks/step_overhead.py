"""What a run does around its steps, as a part of their time: the loop with all of it beside the bare program.

    python -m benchmarks.step_overhead --steps 60 --out benchmarks/results/step_overhead.json

`bare` calls the compiled step on one batch again and again; `loop` is `dsjax train` with reading, the ledger, metrics,
checkpoints and the corruption check. Each in a process of its own, in turns (bare, loop, bare), so that a machine that
slows down shows. The preset small, rows of 128 tokens, float32.
"""

import statistics
import tempfile
import time
from pathlib import Path

from benchmarks import common

BATCH, SEQ = 2, 128


def settings(steps: int, checkpoint_every: int):
    import configs
    from dsjax.config import FaultsConfig, replace

    small = configs.load("small")
    return replace(
        small,
        steps=steps,
        batch_size=BATCH,
        seq_len=SEQ,
        log_every=10,
        eval_every=10**9,
        checkpoint_every=checkpoint_every,
        compute=replace(small.compute, precision="float32"),
        data=replace(small.data, heldout_fraction=0.001),
        faults=FaultsConfig(check_every=100),
    )


def bare(steps: int, checkpoint_every: int) -> dict:
    import jax
    import numpy as np

    from dsjax.train.layout import device_mesh, on_mesh
    from dsjax.train.schedule import Schedule
    from dsjax.train.step import jit_init_state, jit_train_step

    config = settings(steps, checkpoint_every)
    mesh, schedule = device_mesh(config), Schedule(config)
    rows = np.random.default_rng(0).integers(0, config.model.vocab_size, (1, BATCH, SEQ), dtype=np.int32)
    positions = np.broadcast_to(np.arange(SEQ, dtype=np.int32), rows.shape)
    arrays = {"tokens": rows, "segment_ids": np.ones_like(rows), "positions": positions}
    with jax.set_mesh(mesh):
        batch, state, step_fn, times = on_mesh(arrays, mesh), jit_init_state(config)(), jit_train_step(config), []
        for step in range(steps):
            begin = time.perf_counter()
            state, metrics = step_fn(state, batch, schedule.at(step))
            jax.block_until_ready(metrics)
            times.append(time.perf_counter() - begin)
    return {"step_s": statistics.fmean(times[1:]), "median_step_s": statistics.median(times[1:])}


def loop(steps: int, checkpoint_every: int) -> dict:
    from dsjax.train import loop
    from dsjax.train.lines import read_lines

    with tempfile.TemporaryDirectory() as folder:
        loop.train(settings(steps, checkpoint_every), Path(folder) / "run", quiet=True)
        rows = [row for row in read_lines(Path(folder) / "run" / "goodput.jsonl") if row["kind"] == "interval"]
    rows = rows[1:]  # the first has the compiling
    n = 10 * len(rows)
    seconds = {name: sum(row["seconds"].get(name, 0.0) for row in rows) / n for row in rows for name in row["seconds"]}
    return {"step_s": sum(seconds.values()), "of_which": seconds}


def summary(results: dict) -> dict:
    plain = statistics.fmean(results[side]["step_s"] for side in ("bare", "bare again"))
    whole = results["loop"]
    around = sum(s for name, s in whole["of_which"].items() if name != "step")
    return {"overhead": whole["step_s"] / plain - 1, "held_up": around / plain}


if __name__ == "__main__":
    sides = {"bare": bare, "loop": loop, "bare again": bare}
    common.run("benchmarks.step_overhead", __doc__, sides, summary, steps=60, checkpoint_every=50)
