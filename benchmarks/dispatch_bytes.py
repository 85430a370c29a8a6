"""Bytes that a token's way to its experts and back puts on the network: flat dispatch against two levels.

    python -m benchmarks.dispatch_bytes > benchmarks/results/dispatch_bytes.json

DeepSeek-V3's router (256 experts, 8 of them a token, in 4 of 8 groups) with random scores, on fake CPU devices that run
the dispatch of training; what is counted is the rows that it sends, by whether sender and receiver are of one group.
Three ways: a row for each pair (token, expert), as dispatches without deduplication send; a row for each device; and a
row for each group, fanned out inside.

With --topology=v5p:4x4x4 (and libtpu) the same dispatch is compiled for those TPUs too, at 4,096 tokens a device, and
the rows of its ragged all-to-alls' buffers are read from the program: what they can hold, of which rows are a part.
"""

import argparse
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax import P, lax

import configs
from dsjax.model.router import choose_experts
from dsjax.plan import hlo
from sharding.dispatch import Buffers, dispatch
from sharding.mesh import make_mesh


def rows_sent(model, n_devices: int, groups: int, levels: int, tokens: int) -> tuple[float, float]:
    """Rows a token that cross between groups of devices, and that stay inside one; those to oneself are no traffic."""
    limit = model.topk_group if levels == 2 and model.n_group % groups == 0 else None
    buffers = Buffers(groups=groups if levels == 2 else 1, topk_groups=limit)
    inner = n_devices // groups

    def local(indices):
        x = jnp.zeros((tokens, 1))
        _, _, plan = dispatch(
            x, indices, jnp.zeros(indices.shape, jnp.float32), model.n_routed_experts // n_devices, buffers
        )
        me, across, inside = lax.axis_index("expert"), 0, 0
        for way in plan.ways:
            peers = jnp.asarray(way.peers)
            mine = peers[jnp.argmax(jnp.any(peers == me, axis=1))]
            other_group = mine // inner != me // inner
            across += jnp.sum(jnp.where(other_group, way.out.size, 0))
            inside += jnp.sum(jnp.where(other_group | (mine == me), 0, way.out.size))
        return lax.psum(jnp.stack([across, inside]), "expert")

    with jax.set_mesh(make_mesh(jax.devices()[:n_devices], expert=n_devices)):
        indices = jax.device_put(choices(model, n_devices * tokens), P("expert"))
        sent = jax.jit(jax.shard_map(local, in_specs=P("expert"), out_specs=P(), check_vma=False))(indices)
    across, inside = (np.asarray(sent) / (n_devices * tokens)).tolist()
    return across, inside


def pairs_sent(model, n_devices: int, groups: int, tokens: int) -> tuple[float, float]:
    """The same with a row for each pair: what is sent is counted from the choices alone."""
    owner = choices(model, n_devices * tokens) // (model.n_routed_experts // n_devices)
    me = np.repeat(np.arange(n_devices), tokens)[:, None]
    inner = n_devices // groups
    across = owner // inner != me // inner
    return float(np.mean(np.sum(across, axis=1))), float(np.mean(np.sum(~across & (owner != me), axis=1)))


@functools.cache
def choices(model, n: int) -> np.ndarray:
    scores = jax.nn.sigmoid(jax.random.normal(jax.random.key(0), (1, n, model.n_routed_experts)))
    bias = jnp.zeros(model.n_routed_experts)
    return np.asarray(jax.jit(functools.partial(choose_experts, cfg=model))(scores, bias))[0]


def rows_compiled(model, topology: str, groups: int, levels: int, tokens: int = 4096) -> dict[str, float]:
    """Rows a token of the buffers that the compiled dispatch sends from, for exchanges that cross groups of devices or
    stay inside them; a flat dispatch has one exchange for both."""
    from jax.experimental import topologies

    devices = list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    n, k, d = len(devices), model.num_experts_per_tok, model.hidden_size
    limit = model.topk_group if levels == 2 else None
    buffers = Buffers(1.5, groups=groups if levels == 2 else 1, topk_groups=limit, exchange="ragged")

    def local(x, indices, weights):
        rows, row_weights, _ = dispatch(x, indices, weights, model.n_routed_experts // n, buffers)
        return rows, row_weights

    mesh = make_mesh(devices, expert=n)
    with jax.set_mesh(mesh):
        part = jax.NamedSharding(mesh, P("expert"))
        shapes = ((d, jnp.bfloat16), (k, jnp.int32), (k, jnp.float32))
        arguments = [jax.ShapeDtypeStruct((n * tokens, width), dtype, sharding=part) for width, dtype in shapes]
        run = jax.shard_map(local, in_specs=(P("expert"),) * 3, out_specs=P("expert"), check_vma=False)
        program = hlo.Program(jax.jit(run).lower(*arguments).compile().as_text())
    found = {"across": 0.0, "inside": 0.0, "both": 0.0}
    for computation, instruction, _ in program.instructions():
        if instruction.opcode.removesuffix("-start") == "ragged-all-to-all":
            members = hlo.groups(instruction.rest, n)[0]
            where = "both" if len(members) == n else "inside" if members[1] - members[0] == 1 else "across"
            sent = hlo.type_bytes(program.operand_types(computation, instruction)[0])
            found[where] += sent / (2 * d * tokens)
    return {f"buffer_rows_{name}_per_token": round(rows, 2) for name, rows in found.items() if rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256, help="tokens a device")
    parser.add_argument("--devices", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--topology", help="compile for these TPUs too")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", max(options.devices))
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    model = configs.load("v3").model
    row = model.hidden_size * 2  # bfloat16
    table = []
    for n in options.devices:
        for way, (across, inside) in {
            "a row a pair": pairs_sent(model, n, options.groups, options.tokens),
            "flat": rows_sent(model, n, options.groups, 1, options.tokens),
            "two levels": rows_sent(model, n, options.groups, 2, options.tokens),
        }.items():
            table.append(
                {
                    "devices": n,
                    "groups": options.groups,
                    "dispatch": way,
                    "rows_across_groups_per_token": round(across, 3),
                    "rows_inside_groups_per_token": round(inside, 3),
                    "KB_across_groups_per_token": round(across * row / 1e3, 1),
                    "KB_inside_groups_per_token": round(inside * row / 1e3, 1),
                }
            )
    compiled = []
    if options.topology:
        for name, levels in (("flat", 1), ("two levels", 2)):
            rows = rows_compiled(model, options.topology, options.groups, levels)
            compiled.append({"topology": options.topology, "groups": options.groups, "dispatch": name} | rows)
    print(
        json.dumps(
            {"tokens_per_device": options.tokens, "jax": jax.__version__, "table": table, "compiled": compiled},
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
