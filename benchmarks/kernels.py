"""Grouped matmul on TPUs without a TPU: our kernels in bfloat16 and FP8, JAX's megablox and XLA's ragged_dot compiled
down to their last schedule, and read there; prints JSON.

    python -m benchmarks.kernels --aot v6e --aot v5p --out benchmarks/results/kernels_aot.json

Of each kernel: the bundles (cycles, if nothing is waited for) and matmul instructions of the piece of program with most
matmuls, what share of those cycles the matrix units must be busy (`mxu`: four cycles an instruction, from the published
peak; 1 where that is more than the bundles), its `time` by these cycles, over that of matrix units always busy with
bfloat16 (an instruction on E4M3 does twice as much), spilled registers, and CPU seconds to compile. Nothing is run or
timed on a TPU. Needs libtpu (`pip install 'dsjax[plan]'`).
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from benchmarks.common import machine
from dsjax.plan.compile import ENVIRONMENT

TOPOLOGY = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
SHAPES = ["16,16384,7168,2048", "16,16384,2048,7168"]  # experts, rows, K, N: DeepSeek-V3's two
IMPLEMENTATIONS = (
    "ours",
    "fp8 128",
    "fp8 512",
    "megablox",
    "xla",
)  # fp8: ours, with so long blocks of what is summed over
MATMUL_CYCLES = 4


def schedule(text: str) -> dict[str, int]:
    """Bundles, matmuls and spills of a program: those of the piece, between two jumps, with most matmuls.

    Of several with as many it is the shortest, which masks no rows.
    """
    best, begin, matmuls, address = (0, 0), 0, 0, 0
    for line in text.splitlines():
        if not (found := re.match(r" *(0x[0-9a-f]+|0) +(L[HBE]|P[BF]|CT)?: ?", line)):
            continue
        address = int(found[1], 16)
        if found[2] and address:
            best = max(best, (matmuls, begin - address))
            begin, matmuls = address, 0
        matmuls += len(re.findall(r"vmatmul|vmatmsk|matmul\.m", line))
    matmuls, bundles = max(best, (matmuls, begin - address))
    bundles = max(1, -bundles)
    busy = max(1, MATMUL_CYCLES * matmuls)
    return {
        "bundles": bundles,
        "matmuls": matmuls,
        "mxu": round(min(1.0, busy / bundles), 3),
        "time": round(max(bundles, busy) / busy / (2 if re.search(r"vmatmul\S*f8e4m3", text) else 1), 3),
        "spills": text.count("_spill]"),
        "all_bundles": address,
    }


def programs(implementation: str, e: int, m: int, k: int, n: int) -> dict:
    """Of each direction, a function and the shapes of its arguments."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    from pallas_kernels.grouped_matmul_tpu import pallas_tpu
    from pallas_kernels.quantise import Tile, quantise
    from pallas_kernels.scaled_matmul import scaled_gradient, scaled_matmul

    x, w, dy = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((m, k), (e, k, n), (m, n)))
    sizes = jax.ShapeDtypeStruct((e,), jnp.int32)
    if implementation.startswith("fp8"):
        size = int(implementation.split()[1])
        columns, options = {128: 128, 512: 1}[size], {"implementation": "pallas_tpu"}

        def quantised(a, *tile):
            return jax.eval_shape(lambda a: quantise(a, Tile(*tile), implementation="reference"), a)

        def forward(x, w, s):
            return scaled_matmul(x, w, s, **options)

        def dx(dy, w, s):
            return scaled_matmul(dy, w, s, transposed=True, **options)

        def dw(x, dy, s):
            return scaled_gradient(x, dy, s, **options)

        return {
            "forward": (forward, (quantised(x, 1, size), quantised(w, size, columns), sizes)),
            "dx": (dx, (quantised(dy, 1, size), quantised(w, columns, size), sizes)),
            "dw": (dw, (quantised(x, size, 1), quantised(dy, size, 1), sizes)),
        }

    def megablox(x, w, sizes):
        return gmm(x, w, sizes, preferred_element_type=x.dtype, tiling=(512, 1024, 1024))

    def xla(x, w, sizes):
        return jax.lax.ragged_dot(x, w, sizes, preferred_element_type=x.dtype)

    matmul = {"ours": pallas_tpu, "megablox": megablox, "xla": xla}[implementation]
    return {
        "forward": (matmul, (x, w, sizes)),
        "dx": (lambda x, w, dy, s: jax.vjp(lambda x: matmul(x, w, s), x)[1](dy), (x, w, dy, sizes)),
        "dw": (lambda x, w, dy, s: jax.vjp(lambda w: matmul(x, w, s), w)[1](dy), (x, w, dy, sizes)),
    }


def compile_all(chip: str, shapes: list[str], implementations: list[str]) -> list[dict]:
    """Every kernel at every shape for one chip, in this process, where libtpu must dump its schedules."""
    import jax
    import numpy as np
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY[chip]).devices
    mesh = jax.sharding.Mesh(np.array(devices[:1]), ("x",))
    dump = Path(re.search(r"xla_jf_dump_to=(\S+)", os.environ["LIBTPU_INIT_ARGS"])[1])
    sharding = jax.NamedSharding(mesh, jax.P())
    results = []
    for shape, name in itertools.product(shapes, implementations):
        options = {"xla_tpu_enable_ragged_dot_kernel": True} if name == "xla" else None
        for direction, (function, avals) in programs(name, *map(int, shape.split(","))).items():
            for file in dump.iterdir():
                file.unlink()
            row = {"chip": chip, "shape": shape, "implementation": name, "direction": direction}
            avals = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), avals)
            started = time.process_time()
            try:
                with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                    jax.jit(function).lower(*avals).compile(compiler_options=options)
            except Exception as error:  # a competitor that does not compile is a result
                results.append(row | {"error": str(error).splitlines()[0][:200]})
                continue
            seconds = time.process_time() - started
            files = [path for path in dump.glob("*final_bundles.txt") if "schedule" not in path.name]
            found = max((schedule(path.read_text()) for path in files), key=lambda s: s["matmuls"])
            results.append(row | found | {"compile_cpu_s": round(seconds, 1)})
            print(json.dumps(results[-1]), file=sys.stderr)
    return results


def in_own_process(chip: str, shapes: list[str], implementations: list[str]) -> list[dict]:
    """libtpu reads its flags once, and takes the chip's schedule dumps with it."""
    with tempfile.TemporaryDirectory() as dump:
        flags = ENVIRONMENT | {"LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"}
        command = [sys.executable, "-m", "benchmarks.kernels", "--child", "--aot", chip]
        command += [f"--shape={shape}" for shape in shapes] + [f"--implementation={name}" for name in implementations]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | flags, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--aot", action="append", choices=TOPOLOGY, help="chips to compile for (all)")
    parser.add_argument("--shape", action="append", help=f"experts,rows,K,N ({' and '.join(SHAPES)})")
    parser.add_argument("--implementation", action="append", choices=IMPLEMENTATIONS, help="what to compile (all)")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    chips, what = args.aot or list(TOPOLOGY), (args.shape or SHAPES, args.implementation or IMPLEMENTATIONS)
    if args.child:
        print(json.dumps(compile_all(chips[0], *what)))
        return
    results = [row for chip in chips for row in in_own_process(chip, *what)]
    where = machine() | {"libtpu": version("libtpu")}
    text = json.dumps({"command": "python -m benchmarks.kernels", "machine": where, "results": results}, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
