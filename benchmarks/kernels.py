"""Grouped matmul on TPUs without a TPU: our kernels, JAX's megablox and XLA's ragged_dot compiled down to their last
schedule, and read there; prints JSON.

    python -m benchmarks.kernels --aot v6e --aot v5p --out benchmarks/results/kernels_aot.json

Of each kernel: the bundles (cycles, if nothing is waited for) and matmul instructions of the piece of program with most
matmuls, what share of those cycles the matrix units must be busy (`mxu`: four cycles an instruction, from the published
peak; 1 where that is more than the bundles), spilled registers, and CPU seconds to compile. Nothing is run or timed on
a TPU. Needs libtpu (`pip install 'dsjax[plan]'`).
"""

import argparse
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
MATMUL_CYCLES = 4


def schedule(text: str) -> dict[str, int]:
    """Bundles, matmuls and spills of a program: those of the piece, between two jumps, with most matmuls."""
    best, begin, matmuls, address = (0, 0), 0, 0, 0
    for line in text.splitlines():
        if not (found := re.match(r" *(0x[0-9a-f]+|0) +(L[HBE]|P[BF]|CT)?: ?", line)):
            continue
        address = int(found[1], 16)
        if found[2] and address:
            best = max(best, (matmuls, address - begin))
            begin, matmuls = address, 0
        matmuls += len(re.findall(r"vmatmul|vmatmsk|matmul\.m", line))
    matmuls, bundles = max(best, (matmuls, address - begin))
    return {"bundles": bundles, "matmuls": matmuls, "spills": text.count("_spill]"), "all_bundles": address}


def compile_all(chip: str, shapes: list[str]) -> list[dict]:
    """Every kernel at every shape for one chip, in this process, where libtpu must dump its schedules."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    from pallas_kernels.grouped_matmul_tpu import pallas_tpu

    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY[chip]).devices
    mesh = jax.sharding.Mesh(np.array(devices[:1]), ("x",))
    dump = Path(re.search(r"xla_jf_dump_to=(\S+)", os.environ["LIBTPU_INIT_ARGS"])[1])

    def megablox(x, w, sizes):
        return gmm(x, w, sizes, preferred_element_type=x.dtype, tiling=(512, 1024, 1024))

    def xla(x, w, sizes):
        return jax.lax.ragged_dot(x, w, sizes, preferred_element_type=x.dtype)

    results = []
    for shape in shapes:
        e, m, k, n = map(int, shape.split(","))
        avals = [((m, k), jnp.bfloat16), ((e, k, n), jnp.bfloat16), ((m, n), jnp.bfloat16), ((e,), jnp.int32)]
        sharding = jax.NamedSharding(mesh, jax.P())
        x, w, dy, sizes = (jax.ShapeDtypeStruct(*aval, sharding=sharding) for aval in avals)
        for name, matmul in (("ours", pallas_tpu), ("megablox", megablox), ("xla", xla)):
            directions = {
                "forward": lambda x, w, dy, s, f=matmul: f(x, w, s),
                "dx": lambda x, w, dy, s, f=matmul: jax.vjp(lambda x: f(x, w, s), x)[1](dy),
                "dw": lambda x, w, dy, s, f=matmul: jax.vjp(lambda w: f(x, w, s), w)[1](dy),
            }
            options = {"xla_tpu_enable_ragged_dot_kernel": True} if name == "xla" else None
            for direction, function in directions.items():
                for file in dump.iterdir():
                    file.unlink()
                row = {"chip": chip, "shape": shape, "implementation": name, "direction": direction}
                started = time.process_time()
                try:
                    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                        jax.jit(function).lower(x, w, dy, sizes).compile(compiler_options=options)
                except Exception as error:  # a competitor that does not compile is a result
                    results.append(row | {"error": str(error).splitlines()[0][:200]})
                    continue
                seconds = time.process_time() - started
                files = [path for path in dump.glob("*final_bundles.txt") if "schedule" not in path.name]
                found = max((schedule(path.read_text()) for path in files), key=lambda s: s["matmuls"])
                mxu = min(1.0, MATMUL_CYCLES * found["matmuls"] / found["bundles"])
                results.append(row | found | {"mxu": round(mxu, 3), "compile_cpu_s": round(seconds, 1)})
                print(json.dumps(results[-1]), file=sys.stderr)
    return results


def in_own_process(chip: str, shapes: list[str]) -> list[dict]:
    """libtpu reads its flags once, and takes the chip's schedule dumps with it."""
    with tempfile.TemporaryDirectory() as dump:
        flags = ENVIRONMENT | {"LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"}
        command = [sys.executable, "-m", "benchmarks.kernels", "--child", "--aot", chip]
        command += [f"--shape={shape}" for shape in shapes]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | flags, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--aot", action="append", choices=TOPOLOGY, help="chips to compile for (all)")
    parser.add_argument("--shape", action="append", help=f"experts,rows,K,N ({' and '.join(SHAPES)})")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    chips, shapes = args.aot or list(TOPOLOGY), args.shape or SHAPES
    if args.child:
        print(json.dumps(compile_all(chips[0], shapes)))
        return
    results = [row for chip in chips for row in in_own_process(chip, shapes)]
    where = machine() | {"libtpu": version("libtpu")}
    text = json.dumps({"command": "python -m benchmarks.kernels", "machine": where, "results": results}, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
