"""Grouped matmul against lax.ragged_dot and a dense matmul of the same FLOPs, in one run; prints JSON.

    python -m benchmarks.grouped_matmul > benchmarks/results/grouped_matmul_cpu.json

Every time is the least of several; the candidates of one case take turns, so that a busy machine slows them alike.
"""

import argparse
import datetime
import json
import os
import platform
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.grouped_matmul import grouped_matmul

K, E = 512, 32
TRAINING = [(16384, n, dtype) for dtype in (jnp.float32, jnp.bfloat16) for n in (256, 512)]  # M, N, dtype
DECODE = [(4, 256, jnp.float32), (32, 256, jnp.float32)]  # one row per expert present


def forward(x, w, dy, sizes, implementation):
    return grouped_matmul(x, w, sizes, implementation=implementation)


def grad_x(x, w, dy, sizes, implementation):
    return jax.vjp(lambda x: grouped_matmul(x, w, sizes, implementation=implementation), x)[1](dy)


def grad_w(x, w, dy, sizes, implementation):
    return jax.vjp(lambda w: grouped_matmul(x, w, sizes, implementation=implementation), w)[1](dy)


DIRECTIONS = {"forward": forward, "dx": grad_x, "dw": grad_w}
DENSE = {
    "forward": lambda x, w, dy, sizes: x @ w[0],
    "dx": lambda x, w, dy, sizes: dy @ w[0].T,
    "dw": lambda x, w, dy, sizes: x.T @ dy,
}


def operands(m: int, n: int, dtype, sizes):
    rng = np.random.default_rng(0)
    x, w, dy = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in [(m, K), (E, K, n), (m, n)])
    return x, w, dy, jnp.asarray(sizes, jnp.int32)


def time_in_turns(compiled: dict, args, repeats: dict) -> dict:
    """Least wall time in seconds of each compiled function, one after the other, over and over."""
    best = dict.fromkeys(compiled, float("inf"))
    for i in range(-1, max(repeats.values())):  # the first turn warms up
        for name, fn in compiled.items():
            if i < repeats[name]:
                start = time.perf_counter()
                jax.block_until_ready(fn(*args))
                if i >= 0:
                    best[name] = min(best[name], time.perf_counter() - start)
    return best


def measure(m: int, n: int, dtype, direction: str, sizes, repeats: dict) -> dict:
    args = operands(m, n, dtype, sizes)
    functions = {"dense": DENSE[direction]}
    functions |= {name: partial(DIRECTIONS[direction], implementation=name) for name in repeats if name != "dense"}
    compiled = {name: jax.jit(functions[name]).lower(*args).compile() for name in repeats}
    gflop = 2 * m * K * n / 1e9
    result = {"M": m, "K": K, "N": n, "E": E, "dtype": jnp.dtype(dtype).name, "direction": direction}
    wall_s = time_in_turns(compiled, args, repeats)
    for name in repeats:
        result[name] = {
            "ms": round(wall_s[name] * 1e3, 3),
            "gflop_s": round(gflop / wall_s[name], 1),
            "times_dense": round(wall_s[name] / wall_s["dense"], 2),
            "temp_mib": round(compiled[name].memory_analysis().temp_size_in_bytes / 2**20, 1),
        }
    return result


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--ragged-dot-repeats", type=int, default=1, help="it is slow on CPU")
    parser.add_argument("--skip-ragged-dot", action="store_true")
    options = parser.parse_args()
    repeats = {"dense": options.repeats, "tiles": options.repeats, "ragged_dot": options.ragged_dot_repeats}
    if options.skip_ragged_dot:
        del repeats["ragged_dot"]

    cases = []
    for m, n, dtype in TRAINING:
        sizes = np.random.default_rng(0).multinomial(m, [1 / E] * E)
        cases += [measure(m, n, dtype, direction, sizes, repeats) for direction in DIRECTIONS]
    for m, n, dtype in DECODE:
        sizes = [1] * m + [0] * (E - m)
        case = measure(m, n, dtype, "forward", sizes, {name: 10 * count for name, count in repeats.items()})
        w = jnp.ones((E, K, n), dtype)
        read = jax.jit(lambda w, m=m: jnp.sum(w[:m])).lower(w).compile()
        read_s = time_in_turns({"read": read}, (w,), {"read": 10 * options.repeats})["read"]
        case["read_weights_ms"] = round(read_s * 1e3, 3)  # the sum of the weights touched: what memory allows
        cases.append(case)
    print(
        json.dumps(
            {
                "platform": jax.default_backend(),
                "device": jax.devices()[0].device_kind,
                "cpu": cpu_model(),
                "threads": len(os.sched_getaffinity(0)),
                "load_1min_at_end": round(os.getloadavg()[0], 1),
                "jax": jax.__version__,
                "python": platform.python_version(),
                "date": datetime.date.today().isoformat(),
                "command": " ".join(["python -m benchmarks.grouped_matmul", *sys.argv[1:]]),
                "cases": cases,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
