"""The exchange of a layer's rows for TPUs without a TPU: dispatch and combine, forward and backward, compiled with
XLA's ragged all-to-all and with our kernel; prints JSON.

    python -m benchmarks.exchange > benchmarks/results/exchange_aot.json

Rows of DeepSeek-V3's width, 8 experts a token of 32, room for 1.5 times even loads, with no expert's work between. Of
each program the compiler's own numbers: bytes of temporaries, of HBM accessed (of a kernel's arguments and results,
each once), and seconds to compile. Nothing is run or timed on a TPU. Needs libtpu (`pip install 'dsjax[plan]'`).
"""

import argparse
import json
import os
import time
from importlib.metadata import version

from benchmarks.common import machine
from dsjax.plan.compile import ENVIRONMENT

TOPOLOGIES = ["v5e:2x4", "v5p:2x2x2", "v6e:2x4", "tpu7x:2x2x1"]
WAYS = {"flat": {}, "two levels, fp8": {"groups": 2, "fp8": True}}
HIDDEN, EXPERTS, CHOSEN = 7168, 32, 8


def compile_way(topology: str, exchange: str, way: str, tokens: int) -> dict:
    """One program for all devices of a topology, as two halves along `data`."""
    import jax
    import jax.numpy as jnp
    from jax import P
    from jax.experimental import topologies

    from sharding.dispatch import Buffers, combine, dispatch
    from sharding.mesh import make_mesh

    devices = list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    mesh = make_mesh(devices, data=2, expert=-1)  # so that a peer is named by more than its place along `expert`
    buffers = Buffers(1.5, exchange=exchange, **WAYS[way])

    def local(x, indices, weights):
        def there_and_back(x, weights):
            rows, row_weights, plan = dispatch(x, indices, weights, EXPERTS // mesh.shape["expert"], buffers)
            return combine(rows * row_weights[:, None].astype(rows.dtype), plan)

        y, pull = jax.vjp(there_and_back, x, weights)
        return y, pull(y)

    part = P(("data", "expert"))
    columns = ((HIDDEN, jnp.bfloat16), (CHOSEN, jnp.int32), (CHOSEN, jnp.float32))
    with jax.set_mesh(mesh):
        sharding = jax.NamedSharding(mesh, part)
        arguments = [jax.ShapeDtypeStruct((len(devices) * tokens, n), t, sharding=sharding) for n, t in columns]
        run = jax.shard_map(local, in_specs=(part,) * 3, out_specs=part, check_vma=False)
        started = time.process_time()
        compiled = jax.jit(run).lower(*arguments).compile()
    return {
        "topology": topology,
        "way": way,
        "exchange": exchange,
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "accessed_bytes": int(compiled.cost_analysis()["bytes accessed"]),
        "kernels": compiled.as_text().count('custom_call_target="tpu_custom_call"'),
        "compile_cpu_s": round(time.process_time() - started, 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", nargs="+", default=TOPOLOGIES)
    parser.add_argument("--exchange", nargs="+", default=["ragged", "pallas_tpu"])
    parser.add_argument("--way", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--tokens", type=int, default=4096, help="tokens a device")
    args = parser.parse_args()
    os.environ.update(ENVIRONMENT)  # before JAX is imported
    rows = [
        compile_way(topology, exchange, way, args.tokens)
        for topology in args.topology
        for way in args.way
        for exchange in args.exchange
    ]
    where = machine() | {"libtpu": version("libtpu")}
    print(json.dumps({"tokens_per_device": args.tokens, "machine": where, "results": rows}, indent=1))


if __name__ == "__main__":
    main()
