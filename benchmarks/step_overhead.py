"""What a run does around its steps, as a part of their time: the loop with all of it beside the bare program.

    python -m benchmarks.step_overhead --steps 60 --out benchmarks/results/step_overhead.json

`bare` calls the compiled step on the run's own batches, read beforehand; `loop` is `dsjax train` with reading, the
ledger, metrics, checkpoints and the corruption check. Each in a process of its own, in turns (bare, loop, bare), so
that a machine that slows down shows. The first ten steps, with the compiling, do not count. Where the machine's own
speed drifts by more than what is looked for, the CPU time of the threads that are not XLA's tells more than the clock.
The preset small as in docs/faults.md: four rows of 256 tokens, float32, moments in bfloat16.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks import common

BATCH, SEQ = 4, 256
FIRST = 10  # steps that do not count, and those of an interval


def settings(steps: int, checkpoint_every: int):
    import configs
    from dsjax.config import FaultsConfig, replace

    small = configs.load("small")
    return replace(
        small,
        steps=steps,
        batch_size=BATCH,
        seq_len=SEQ,
        log_every=FIRST,
        eval_every=10**9,
        checkpoint_every=checkpoint_every,
        compute=replace(small.compute, precision="float32"),
        optimizer=replace(small.optimizer, moments_dtype="bfloat16"),
        data=replace(small.data, heldout_fraction=0.001),
        faults=FaultsConfig(check_every=100),
    )


def cpu_seconds() -> dict:
    """Of this process so far: all of it, and that of XLA's own threads, which compute the steps."""
    ticks = os.sysconf("SC_CLK_TCK")
    xla = 0
    for task in Path("/proc/self/task").iterdir():
        name, _, rest = (task / "stat").read_text().partition("(")[2].rpartition(")")
        if "XLAEigen" in name:
            xla += sum(map(int, rest.split()[11:13]))
    return {"all": time.process_time(), "xla": xla / ticks}


def between(first: dict, last: dict, steps: int) -> dict:
    """A step's, of XLA's threads and of the others."""
    xla, whole = (last[name] - first[name] for name in ("xla", "all"))
    return {"cpu_of_steps_s": xla / steps, "cpu_of_the_rest_s": (whole - xla) / steps}


def bare(steps: int, checkpoint_every: int) -> dict:
    import jax

    from dsjax.data.pipeline import batches, load_corpus, train_rows
    from dsjax.train.layout import device_mesh, on_mesh
    from dsjax.train.schedule import Schedule
    from dsjax.train.step import jit_init_state, jit_train_step

    config = settings(steps, checkpoint_every)
    mesh, schedule = device_mesh(config), Schedule(config)
    with tempfile.TemporaryDirectory() as folder:
        corpus = load_corpus(config.data, config.model.vocab_size, Path(folder), seed=config.seed, progress=False)
        rows = train_rows(corpus, config.data, config.seq_len, config.seed)
        read = [arrays for _, arrays in batches(rows, schedule.rows, 0, steps, micro_batch=BATCH, mine=range(BATCH))]
    with jax.set_mesh(mesh):
        state, step_fn, times, first = jit_init_state(config)(), jit_train_step(config), [], {}
        for step, arrays in enumerate(read):
            if step == FIRST:
                first = cpu_seconds()
            batch = on_mesh({name: a[None] for name, a in arrays.items()}, mesh)
            begin = time.perf_counter()
            state, metrics = step_fn(state, batch, schedule.at(step))
            jax.block_until_ready(metrics)
            times.append(time.perf_counter() - begin)
    return {"step_s": statistics.fmean(times[FIRST:])} | between(first, cpu_seconds(), steps - FIRST)


def loop(steps: int, checkpoint_every: int) -> dict:
    from dsjax.train import loop
    from dsjax.train.journal import Goodput

    seen, interval = {}, Goodput.interval

    def noted(self, step, kind="interval"):
        result = interval(self, step, kind)
        if kind == "interval":
            seen[step], seconds[step] = cpu_seconds(), result
        return result

    seconds = {}
    Goodput.interval = noted
    with tempfile.TemporaryDirectory() as folder:
        loop.train(settings(steps, checkpoint_every), Path(folder) / "run", quiet=True)
    n, spent = steps - FIRST, [seconds[step] for step in range(2 * FIRST, steps + 1, FIRST)]
    of_which = {name: sum(s.get(name, 0.0) for s in spent) / n for name in ("step", "input", "checkpoint")}
    return {"step_s": sum(of_which.values()), "of_which": of_which} | between(seen[FIRST], seen[steps], n)


def summary(results: dict) -> dict:
    """Held up: what the loop's thread waits for between steps. CPU: what the rest of the process uses of all cores."""
    sides = [results["bare"], results["bare again"]]
    step_s, rest = (statistics.fmean(side[name] for side in sides) for name in ("step_s", "cpu_of_the_rest_s"))
    whole = results["loop"]
    more = whole["cpu_of_the_rest_s"] - rest
    around = sum(s for name, s in whole["of_which"].items() if name != "step")
    return {
        "held_up": around / step_s,
        "cpu": more / (os.cpu_count() * step_s),
        "clock": whole["step_s"] / step_s - 1,
    }


if __name__ == "__main__":
    sides = {"bare": bare, "loop": loop, "bare again": bare}
    common.run("benchmarks.step_overhead", __doc__, sides, summary, steps=60, checkpoint_every=50)
