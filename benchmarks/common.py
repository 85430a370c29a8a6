"""What the benchmarks share: the shape, the machine they ran on, processes of their own, JSON out."""

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

THREADS = 2

# One V3-shaped model for both sides: about 105M parameters.
SHAPE: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "q_lora_rank": 256,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 32,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 4096,
    "initializer_range": 0.02,
}


def machine() -> dict[str, Any]:
    """The machine, the versions and the date."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("jax", "flax", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": THREADS,
        "python": platform.python_version(),
        **found,
        "date": datetime.date.today().isoformat(),
    }


def in_own_process(module: str, side: str, *args: str) -> dict[str, Any]:
    """The JSON that `python -m module --side SIDE` prints, with its peak memory; a side that cannot run says why."""
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", module, "--side", side, *args]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def peak_memory_gib() -> float:
    """Highest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def run(module: str, doc: str, sides: dict[str, Callable[..., dict]], summary: Callable[[dict], dict], **options: int):
    """The command line of a benchmark: each side in its own process, one after the other, then JSON."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--side", choices=sides, help="run one side in this process")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    for name, default in options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    args = parser.parse_args()
    chosen = {name: getattr(args, name) for name in options}
    if args.side:
        print(json.dumps(sides[args.side](**chosen)))
        return
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in chosen.items()]
    results = {side: in_own_process(module, side, *flags) for side in sides}
    command = f"python -m {module} " + " ".join(flags)
    report = {"command": command, "machine": machine(), **chosen, **results, **summary(results)}
    text = json.dumps(report, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
