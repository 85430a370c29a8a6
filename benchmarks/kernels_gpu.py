"""The kernels for Hopper GPUs without a GPU: compiled for an H100 down to its machine code, beside what XLA makes of
their definitions; prints JSON.

    python -m benchmarks.kernels_gpu --out benchmarks/results/kernels_h100_aot.json

Of each kernel what NVIDIA's assembler says: registers a thread, bytes spilled, and whether it had to put tensor core
instructions in sequence; with them the tensor core instructions in the program. Of all programs CPU seconds to compile,
temporary memory, and the bytes that their steps read and write. Nothing is run or timed on a GPU. Needs XLA's compiler
for GPUs (`pip install 'dsjax[plan-gpu]'`; neither a GPU nor NVIDIA's libraries).
"""

import argparse
import functools
import importlib.util
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import machine
from dsjax.plan import hlo

CHIP = "NVIDIA H100 80GB HBM3"
SHAPES = ["4,32768,7168,4096", "8,32768,2048,7168"]  # experts, rows, K, N: DeepSeek-V3's two
QUANTISED = ["8192,7168", "8192,576"]
DECODING = ["64,1,128,8192", "1,2,128,8192"]  # rows, new tokens, heads, entries of latents of 512 + 64
PAGE = 128  # entries a page, where they lie in pages


def compiler():
    """Where XLA's compiler for GPUs is installed; None if it is not."""
    there = importlib.util.find_spec("jax_plugins") is not None
    return importlib.util.find_spec("jax_plugins.xla_cuda13") if there else None


def description(chip: str) -> str:
    """What XLA's compiler has to know of a GPU, as text: one of those that are built into it.

    Raises ValueError for one that is not, ModuleNotFoundError if the compiler is not installed.
    """
    spec = compiler()
    if spec is None:
        raise ModuleNotFoundError("XLA's compiler for GPUs is not installed: pip install 'dsjax[plan-gpu]'")
    library = (Path(spec.origin).parent / "xla_cuda_plugin.so").read_bytes()
    at = library.find(f'device_description_str: "{chip}"\n'.encode())
    if at < 0:
        raise ValueError(f"{chip}: not known to XLA's compiler")
    return library[library.rfind(b"\0", 0, at) + 1 : library.find(b"\0", at)].decode()


def compile_all(shapes: list[str], decoding: list[str], quantised_shapes: list[str], dump: Path) -> list[dict]:
    """Every kernel at every shape, in this process, whose environment must have Mosaic GPU dump into `dump`."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies

    from pallas_kernels import grouped_matmul as bf16
    from pallas_kernels import latent_attention, paged_attention, quantise
    from pallas_kernels.quantise import E4M3, Quantised, Tile
    from pallas_kernels.scaled_matmul_gpu import scaled_gradient_gpu, scaled_matmul_gpu

    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=description(CHIP), topology="1x1x1"
    )
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("x",))

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, jax.P()))

    def quantised(tile, *shape):
        *stack, r, c = shape
        scales = array(jnp.float32, *stack, -(-r // tile.rows), -(-c // tile.columns))
        return Quantised(array(E4M3, *shape), scales, tile)

    def gradient(multiply, index):  # of x or w alone
        def of(x, w, sizes, dy):
            return jax.vjp(lambda x, w: multiply(x, w, sizes), x, w)[1](dy)[index]

        return of

    def kernel(x, w, sizes):
        return bf16.pallas_gpu(x, w, sizes, alignment=128)

    def gathered(q_latent, q_rope, c_kv, k_rope, table, length, layer, scale):
        past = (paged_attention.gather(pages, table, layer) for pages in (c_kv, k_rope))
        return latent_attention.pallas_gpu(q_latent, q_rope, *past, length, scale)

    rows, column, block = Tile(1, 128), Tile(128, 1), Tile(128, 128)
    cases = []
    for shape in shapes:
        e, m, k, n = map(int, shape.split(","))
        x, w, dy, sizes = (
            array(jnp.bfloat16, m, k),
            array(jnp.bfloat16, e, k, n),
            array(jnp.bfloat16, m, n),
            array(jnp.int32, e),
        )
        weights = quantised(block, e, k, n)
        cases += [
            ("bf16 forward", shape, kernel, (x, w, sizes)),
            ("bf16 gradient of x", shape, gradient(kernel, 0), (x, w, sizes, dy)),
            ("bf16 gradient of w", shape, gradient(kernel, 1), (x, w, sizes, dy)),
            (
                "fp8 forward",
                shape,
                lambda x, w, sizes: scaled_matmul_gpu(x, w, sizes, False, jnp.bfloat16, True),
                (quantised(rows, m, k), weights, sizes),
            ),
            (
                "fp8 gradient of x",
                shape,
                lambda dy, w, sizes: scaled_matmul_gpu(dy, w, sizes, True, jnp.bfloat16, True),
                (quantised(rows, m, n), weights, sizes),
            ),
            (
                "fp8 gradient of w",
                shape,
                lambda x, dy, sizes: scaled_gradient_gpu(x, dy, sizes, jnp.bfloat16),
                (quantised(column, m, k), quantised(column, m, n), sizes),
            ),
            ("XLA bf16 forward", shape, bf16.ragged_dot, (x, w, sizes)),
        ]
    for shape in decoding:
        b, t, h, s = map(int, shape.split(","))
        shapes_of = (b, t, h, 512), (b, t, h, 64), (b, s, 512), (b, s, 64)
        arguments = *(array(jnp.bfloat16, *of) for of in shapes_of), array(jnp.int32, b)
        for name, f in (
            ("decoding", latent_attention.pallas_gpu),
            ("XLA decoding", latent_attention.reference),
        ):
            cases.append((name, shape, functools.partial(f, scale=192**-0.5), arguments))
        n = s // PAGE
        queries, lengths = arguments[:2], arguments[-1]
        pages = (array(jnp.bfloat16, 1, b * n, PAGE, width) for width in (512, 64))
        arguments = *queries, *pages, array(jnp.int32, b, n), lengths, array(jnp.int32)
        for name, f in (
            ("paged decoding", paged_attention.pallas_gpu),
            ("XLA gather and decoding", gathered),
            ("XLA paged decoding", paged_attention.reference),
        ):
            cases.append((name, shape, functools.partial(f, scale=192**-0.5), arguments))
    for shape in quantised_shapes:
        x = array(jnp.bfloat16, *map(int, shape.split(",")))
        for tile in rows, column, block, block._replace(ue8m0=True):
            for name, f in (("quantise", quantise.by_gpu_kernel), ("XLA quantise", quantise.reference)):
                full = f"{name} {tile.rows} x {tile.columns}{' ue8m0' if tile.ue8m0 else ''}"
                cases.append((full, shape, functools.partial(f, tile=tile), (x,)))

    found = []
    for name, shape, f, arguments in cases:
        before, begun = set(dump.iterdir()), time.process_time()
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            program = jax.jit(f).lower(*arguments).compile()
        row = {"kernel": name, "shape": shape, "cpu_s": round(time.process_time() - begun, 1)}
        row["temporary_bytes"] = program.memory_analysis().temp_size_in_bytes
        row["moved_bytes"] = moved(program.as_text())
        for path in set(dump.iterdir()) - before:
            if path.suffix == ".ptxas":
                row |= assembled(path.read_text())
            if path.suffix == ".ptx":
                row["wgmma"] = len(re.findall(r"wgmma\.mma_async", path.read_text()))
        found.append(row)
    return found


def moved(text: str) -> int:
    """Bytes that a program's steps read and write: operands and results of all that its entry runs, whole."""
    program = hlo.Program(text)
    none = "parameter", "constant", "bitcast", "tuple", "get-tuple-element"
    steps = [i for i in program.computations[program.entry].values() if i.opcode not in none]
    types = [[step.type, *program.operand_types(program.entry, step)] for step in steps]
    return int(sum(hlo.type_bytes(one) for of_step in types for one in of_step))


def assembled(text: str) -> dict[str, int | bool]:
    """What NVIDIA's assembler says of a kernel."""
    return {
        "registers": int(re.search(r"Used (\d+) registers", text)[1]),
        "spilled_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", text))),
        "in_sequence": "serialized" in text,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", metavar="E,M,K,N", help=f"default: {' and '.join(SHAPES)}")
    parser.add_argument("--decoding", action="append", metavar="B,T,H,S", help=f"default: {' and '.join(DECODING)}")
    parser.add_argument("--quantise", action="append", metavar="R,C", help=f"default: {' and '.join(QUANTISED)}")
    parser.add_argument("--out", type=Path, help="JSON goes here too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as dump:
        os.environ |= {
            "JAX_PLATFORMS": "cpu",
            "MOSAIC_GPU_DUMP_TO": dump,
            "MOSAIC_GPU_DUMP_PTX": "1",
            "MOSAIC_GPU_DUMP_PTXAS": "1",
        }
        result = {
            "command": " ".join(["python -m benchmarks.kernels_gpu", *sys.argv[1:]]),
            "machine": machine(),
            "chip": CHIP,
            "kernels": compile_all(
                arguments.shape or SHAPES,
                arguments.decoding or DECODING,
                arguments.quantise or QUANTISED,
                Path(dump),
            ),
        }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
