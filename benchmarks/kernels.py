"""Kernels for TPUs without a TPU: the grouped matmul by ours, JAX's megablox and XLA's ragged_dot, ours with SwiGLU and
in FP8, and the attention of decoding by ours and XLA, compiled to their last schedules, and read there; prints JSON.

    python -m benchmarks.kernels --kernel grouped_matmul --aot v6e --aot v5p --out benchmarks/results/kernels_aot.json
    python -m benchmarks.kernels --kernel grouped_swiglu --out benchmarks/results/grouped_swiglu_aot.json
    python -m benchmarks.kernels --kernel scaled_matmul --out benchmarks/results/kernels_aot_fp8.json
    python -m benchmarks.kernels --kernel latent_attention --out benchmarks/results/latent_attention_aot.json
    python -m benchmarks.kernels --kernel paged_attention --out benchmarks/results/paged_attention_aot.json

Of each kernel: the bundles (cycles, if nothing is waited for) and matmul instructions of the piece of program with most
matmuls, what share of those cycles the matrix units must be busy (`mxu`: four cycles an instruction, from the published
peak; 1 where that is more than the bundles), its `time` by these cycles, over that of matrix units always busy with
bfloat16 (an instruction on E4M3 does twice as much), spilled registers, VMEM, CPU seconds to compile. Of our attention
the piece is a block of entries with its mask, which only a row's end needs. Then the bytes of HBM that the compiler
counts (of our kernels those they state: operands and results once) and those of temporaries, copies included.
Nothing is run or timed on a TPU. Needs libtpu (`pip install 'dsjax[plan]'`), and takes in tokamax if it is installed.
"""

import argparse
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from benchmarks.common import machine
from dsjax.plan.compile import ENVIRONMENT

TOPOLOGY = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
SHAPES = {
    "grouped_matmul": ["16,16384,7168,2048", "16,16384,2048,7168"],  # experts, rows, K, N: DeepSeek-V3's two
    "grouped_swiglu": ["16,16384,7168,2048"],
    "scaled_matmul": ["16,16384,7168,4096", "16,16384,2048,7168"],
    "latent_attention": ["64,128,512,64,8192"],  # B, H, C, R, S: DeepSeek-V3's
    "paged_attention": ["64,128,512,64,8192,128"],  # the same, and entries a page
}
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


def vmem(program: Path) -> int:
    """Bytes of the buffers that a program allocates on the chip, from the first of its dumps."""
    (first,) = program.parent.glob(re.sub(r"-\d+-final_bundles", "-*-original", program.name))
    return sum(int(size, 16) for size in re.findall(r"space=vmem, size = 0x([0-9a-f]+)", first.read_text()))


class Case(NamedTuple):
    """One program to compile."""

    implementation: str
    direction: str
    function: Callable
    arguments: tuple  # trees of shapes and dtypes
    options: dict | None = None
    donated: tuple[int, ...] = ()


def grouped_matmul(e: int, m: int, k: int, n: int) -> Iterator[Case]:
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    from pallas_kernels.grouped_matmul_tpu import pallas_tpu

    def megablox(x, w, sizes):
        return gmm(x, w, sizes, preferred_element_type=x.dtype, tiling=(512, 1024, 1024))

    def xla(x, w, sizes):
        return jax.lax.ragged_dot(x, w, sizes, preferred_element_type=x.dtype)

    def tokamax(x, w, sizes):
        import tokamax

        options = {"implementation": "mosaic", "bypass_device_check": True}  # the device is not there
        return tokamax.ragged_dot(x, w, sizes, preferred_element_type=x.dtype, **options)

    names = {"ours": pallas_tpu, "megablox": megablox, "xla": xla}
    if importlib.util.find_spec("tokamax"):
        names["tokamax"] = tokamax
    arguments = *_bfloat16((m, k), (e, k, n), (m, n)), jax.ShapeDtypeStruct((e,), jnp.int32)
    for name, matmul in names.items():
        directions = {
            "forward": lambda x, w, dy, s, f=matmul: f(x, w, s),
            "dx": lambda x, w, dy, s, f=matmul: jax.vjp(lambda x: f(x, w, s), x)[1](dy),
            "dw": lambda x, w, dy, s, f=matmul: jax.vjp(lambda w: f(x, w, s), w)[1](dy),
        }
        options = {"xla_tpu_enable_ragged_dot_kernel": True} if name == "xla" else None
        for direction, function in directions.items():
            yield Case(name, direction, function, arguments, options)


def grouped_swiglu(e: int, m: int, k: int, n: int) -> Iterator[Case]:
    """SwiGLU of two products, in one kernel and apart: alone, and in training, where the products are kept."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.grouped_matmul import _weighted_swiglu
    from pallas_kernels.grouped_matmul_tpu import pallas_tpu
    from pallas_kernels.grouped_swiglu_tpu import gate_up

    def ours(x, row_weights, w_gate, w_up, sizes, keep):
        return gate_up(x, row_weights[:, None], (w_gate, w_up), sizes, _weighted_swiglu, keep=keep)

    def apart(x, row_weights, w_gate, w_up, sizes, keep):
        gate, up = (pallas_tpu(x, w, sizes) for w in (w_gate, w_up))
        h = _weighted_swiglu(gate, up, row_weights[:, None]).astype(x.dtype)
        return (gate, up, h) if keep else h

    x, *weights = _bfloat16((m, k), (e, k, n), (e, k, n))
    of_rows, sizes = jax.ShapeDtypeStruct((m,), jnp.float32), jax.ShapeDtypeStruct((e,), jnp.int32)
    for name, f in (("ours", ours), ("apart", apart)):
        for direction, keep in (("forward", False), ("training", True)):
            yield Case(name, direction, functools.partial(f, keep=keep), (x, of_rows, *weights, sizes))


def scaled_matmul(e: int, m: int, k: int, n: int) -> Iterator[Case]:
    """With blocks of 128 and of 512 values that are summed over."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels import scaled_matmul as scaled
    from pallas_kernels.quantise import Tile, quantise

    x, w, dy = _bfloat16((m, k), (e, k, n), (m, n))
    sizes, options = jax.ShapeDtypeStruct((e,), jnp.int32), {"implementation": "pallas_tpu"}

    def quantised(a, *tile):
        return jax.eval_shape(lambda a: quantise(a, Tile(*tile), implementation="reference"), a)

    def forward(x, w, s):
        return scaled.scaled_matmul(x, w, s, **options)

    def dx(dy, w, s):
        return scaled.scaled_matmul(dy, w, s, transposed=True, **options)

    def dw(x, dy, s):
        return scaled.scaled_gradient(x, dy, s, **options)

    for size, columns in ((128, 128), (512, 1)):
        name = f"fp8 {size}"
        yield Case(name, "forward", forward, (quantised(x, 1, size), quantised(w, size, columns), sizes))
        yield Case(name, "dx", dx, (quantised(dy, 1, size), quantised(w, columns, size), sizes))
        yield Case(name, "dw", dw, (quantised(x, size, 1), quantised(dy, size, 1), sizes))


def latent_attention(b: int, h: int, c: int, r: int, s: int) -> Iterator[Case]:
    import jax
    import jax.numpy as jnp

    from pallas_kernels.latent_attention import pallas_tpu, reference

    shapes = (b, 1, h, c), (b, 1, h, r), (b, s, c), (b, s, r)
    arguments = *_bfloat16(*shapes), jax.ShapeDtypeStruct((b,), jnp.int32)
    for name, attend in (("ours", pallas_tpu), ("xla", reference)):
        yield Case(name, "decode", functools.partial(attend, scale=0.1), arguments)


def paged_attention(b: int, h: int, c: int, r: int, s: int, page: int) -> Iterator[Case]:
    """Of pages read in place, of pages put together for the kernel of latent_attention, and by XLA. A step writes two
    new tokens a row first."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels import paged_attention as paged
    from pallas_kernels.latent_attention import pallas_tpu

    def gathered(q_latent, q_rope, c_kv, k_rope, table, length, layer, scale):
        past = paged.gather(c_kv, table, layer), paged.gather(k_rope, table, layer)
        return pallas_tpu(q_latent, q_rope, *past, length, scale)

    def step(c_kv, k_rope, new_c_kv, new_k_rope, q_latent, q_rope, *places, attend, whole):
        c_kv = paged.write(c_kv, new_c_kv, *places)
        k_rope = paged.write(k_rope, new_k_rope, *places, whole=whole)
        return c_kv, k_rope, attend(q_latent, q_rope, c_kv, k_rope, *places)

    n = s // page
    queries, new = (_bfloat16((b, t, *inner, c), (b, t, *inner, r)) for t, inner in ((1, (h,)), (2, ())))
    queries_of_new, pages = _bfloat16((b, 2, h, c), (b, 2, h, r)), _bfloat16((1, b * n, page, c), (1, b * n, page, r))
    places = tuple(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((b, n), (b,), ()))
    for name, attend in (("ours", paged.pallas_tpu), ("gathered", gathered), ("xla", paged.reference)):
        attend = functools.partial(attend, scale=0.1)
        yield Case(name, "decode", attend, (*queries, *pages, *places))
        of_step = functools.partial(step, attend=attend, whole=name == "ours")
        yield Case(name, "step", of_step, (*pages, *new, *queries_of_new, *places), donated=(0, 1))


KERNELS = {f.__name__: f for f in (grouped_matmul, grouped_swiglu, scaled_matmul, latent_attention, paged_attention)}


def _bfloat16(*shapes: tuple[int, ...]) -> list:
    import jax
    import jax.numpy as jnp

    return [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]


def compile_all(chip: str, kernel: str, shapes: list[str], only: list[str] | None) -> list[dict]:
    """A kernel at every shape for one chip, in this process, where libtpu must dump its schedules.

    only: implementations and directions, "ours forward"; all, if not given.
    """
    import jax
    import numpy as np
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY[chip]).devices
    mesh = jax.sharding.Mesh(np.array(devices[:1]), ("x",))
    sharding = jax.NamedSharding(mesh, jax.P())
    dump = Path(re.search(r"xla_jf_dump_to=(\S+)", os.environ["LIBTPU_INIT_ARGS"])[1])

    results = []
    for shape in shapes:
        for case in KERNELS[kernel](*map(int, shape.split(","))):
            if only and f"{case.implementation} {case.direction}" not in only:
                continue
            for file in dump.iterdir():
                file.unlink()
            row = {"chip": chip, "shape": shape, "implementation": case.implementation, "direction": case.direction}
            arguments = jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), case.arguments
            )
            started = time.process_time()
            try:
                with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                    lowered = jax.jit(case.function, donate_argnums=case.donated).lower(*arguments)
                    compiled = lowered.compile(compiler_options=case.options)
            except Exception as error:  # a competitor that does not compile is a result
                results.append(row | {"error": str(error).splitlines()[0][:200]})
                continue
            seconds = time.process_time() - started
            files = [path for path in dump.glob("*final_bundles.txt") if "schedule" not in path.name]
            found, busiest = max(((schedule(path.read_text()), path) for path in files), key=lambda f: f[0]["matmuls"])
            row |= found | {"vmem_bytes": vmem(busiest), "compile_cpu_s": round(seconds, 1)}
            row["hbm_bytes"] = int(compiled.cost_analysis()["bytes accessed"])
            row["temporary_bytes"] = compiled.memory_analysis().temp_size_in_bytes
            results.append(row)
            print(json.dumps(row), file=sys.stderr)
    return results


def in_own_process(chip: str, kernel: str, shapes: list[str], only: list[str] | None = None) -> list[dict]:
    """libtpu reads its flags once, and takes the chip's schedule dumps with it."""
    with tempfile.TemporaryDirectory() as dump:
        flags = ENVIRONMENT | {"LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"}
        command = [sys.executable, "-m", "benchmarks.kernels", "--child", "--aot", chip, "--kernel", kernel]
        command += [f"--shape={shape}" for shape in shapes] + [f"--only={name}" for name in only or []]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | flags, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--aot", action="append", choices=TOPOLOGY, help="chips to compile for (all)")
    parser.add_argument("--kernel", choices=KERNELS, default="grouped_matmul")
    parser.add_argument("--shape", action="append", help=f"experts,rows,K,N, or B,H,C,R,S ({SHAPES})")
    parser.add_argument("--only", action="append", metavar="NAME", help='as in "ours forward" or "fp8 512 dw" (all)')
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    chips, shapes = args.aot or list(TOPOLOGY), args.shape or SHAPES[args.kernel]
    if args.child:
        print(json.dumps(compile_all(chips[0], args.kernel, shapes, args.only)))
        return
    results = [row for chip in chips for row in in_own_process(chip, args.kernel, shapes, args.only)]
    where = machine() | {"libtpu": version("libtpu")}
    command = f"python -m benchmarks.kernels --kernel {args.kernel}"
    text = json.dumps({"command": command, "machine": where, "results": results}, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
