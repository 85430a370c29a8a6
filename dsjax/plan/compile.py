"""The training step compiled for a TPU slice by libtpu, on a machine without a TPU: memory, cost, collectives.

Every compile is a process of its own: libtpu may end the process that it runs in, and its memory is given back.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from dsjax.config import Config, ConfigError, from_dict, replace, to_dict
from dsjax.plan import hlo
from dsjax.plan.chips import Topology, parse

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # no metadata server is asked what machine this is
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
_GIB = 1 << 30


class CompileError(ConfigError):
    """The compiler's refusal in one line; `needs` is the HBM that a device would have needed, where that was it."""

    def __init__(self, message: str, needs: float | None = None):
        super().__init__(message)
        self.needs = needs


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of one step. Memory in bytes a device; times of the collectives and FLOPs: a step's."""

    arguments: int
    outputs: int
    aliased: int
    temporary: int
    parameters: int
    optimizer: int
    gradients: int
    activations: int
    optimal_s: float  # the compiler's own: a loop's body counts once
    cost_flops: float  # the same analysis
    flops: float  # of all matrix products, loops unrolled, kernels at all their rows
    cycles: int  # the compiler's estimates summed, loops unrolled
    collectives: list[dict[str, Any]]
    cpu_s: float
    wall_s: float
    peak_rss: int
    jax: str
    libtpu: str

    @property
    def hbm(self) -> int:
        """Bytes of HBM that a device needs."""
        return self.arguments + self.outputs - self.aliased + self.temporary


def available() -> bool:
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def compile_step(config: Config, topology: Topology, timeout_s: float = 3600, keep_hlo: str = "") -> Compiled:
    """Compiles the step of a configuration for a slice. Raises CompileError with the compiler's reason, one line."""
    if not available():
        raise CompileError("libtpu is not installed: `pip install 'dsjax[plan]'` compiles for TPUs without one")
    with tempfile.TemporaryDirectory() as folder:
        job, out = Path(folder, "job.json"), Path(folder, "out.json")
        job.write_text(json.dumps({"config": to_dict(config), "topology": topology.name, "hlo": keep_hlo}))
        process = subprocess.Popen(
            [sys.executable, "-m", "dsjax.plan.compile", str(job), str(out)],
            env=os.environ | ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        try:
            _, errors = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise CompileError(f"compiling for {topology.name}: not done after {timeout_s:.0f} s") from None
        finally:
            process.kill()
            process.wait()
        if not out.exists():
            raise CompileError(_died(process.returncode, errors, topology))
        said = json.loads(out.read_text())
    if "refused" in said:
        raise CompileError(said["refused"])
    if "error" in said:
        message, needs = explain(said["error"], topology)
        raise CompileError(message, needs)
    return Compiled(**said)


def explain(error: str, topology: Topology) -> tuple[str, float | None]:
    """The compiler's error in one line, and the bytes of HBM a device it asked for if that was the reason."""
    text = " ".join(error.split())
    memory = re.search(r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm", text) or re.search(
        r"temporaries \(([\d.]+)([KMG])\) exceeds available HBM \(([\d.]+)([KMG])\)", text
    )
    if memory:
        used, limit = (_size(memory[i], memory[i + 1]) for i in (1, 3))
        return (
            f"does not fit {topology.name}: a device needs {used / _GIB:.1f} GiB of HBM and has {limit / _GIB:.1f} GiB",
            used,
        )
    if "memory space vmem" in text:
        where = re.search(r"allocating on stack for (%[\w.-]+)", text)
        return f"the compiler ran out of on-chip memory (vmem){' at ' + where[1] if where else ''}: {text[:200]}", None
    return f"the compiler refused: {text[:300]}", None


def _size(number: str, unit: str) -> float:
    return float(number) * {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[unit]


def _died(code: int, errors: str, topology: Topology) -> str:
    last = [line for line in errors.splitlines() if line.strip() and not line.startswith(("=== ", "learning/"))]
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return f"compiling for {topology.name}: the compiler {how}{': ' + last[-1].strip()[:200] if last else ''}"


def for_tpu(config: Config) -> Config:
    """The same with what `auto` means on a TPU, as the platform of the compiling process is a CPU."""
    from dsjax.model import attention
    from pallas_kernels import grouped_matmul, latent_attention, scaled_matmul
    from sharding import ragged

    modules = {
        "grouped_matmul": grouped_matmul,
        "scaled_matmul": scaled_matmul,
        "attention": attention,
        "latent_attention": latent_attention,
        "exchange": ragged,
    }
    chosen = {
        name: module.IMPLEMENTATION_BY_PLATFORM["tpu"]
        for name, module in modules.items()
        if getattr(config.compute, name) == "auto"
    }
    return replace(config, compute=replace(config.compute, **chosen))


def _run(job: dict[str, Any]) -> dict[str, Any]:
    """The work of the compiling process."""
    import jax
    from jax.experimental import topologies

    from dsjax.train.layout import check_mesh
    from dsjax.train.step import train_step
    from sharding.mesh import make_mesh

    started = time.monotonic()
    config, topology = for_tpu(from_dict(job["config"])), parse(job["topology"])
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices
    mesh = make_mesh(list(devices), **vars(config.mesh))
    check_mesh(config, mesh.shape)
    with jax.set_mesh(mesh):
        arguments = abstract_arguments(config, mesh)
        step = jax.jit(functools.partial(train_step, config=config), donate_argnums=0)
        try:
            compiled = step.lower(*arguments).compile()
        except jax.errors.JaxRuntimeError as error:
            return {"error": str(error)}
        activations = saved_bytes(config, *arguments)
    used = resource.getrusage(resource.RUSAGE_SELF)
    memory, cost, libtpu = (
        compiled.memory_analysis(),
        compiled.cost_analysis() or {},
        importlib.metadata.version("libtpu"),
    )
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError:
        raise ConfigError(
            f"JAX {jax.__version__} cannot read what libtpu {libtpu} compiles: `pip install 'dsjax[plan]'` takes the "
            "libtpu that fits"
        ) from None
    if job["hlo"]:
        Path(job["hlo"]).write_text(text)
    program = hlo.Program(text)
    state = arguments[0]
    return {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "parameters": device_bytes((state.model, state.ema)),
        "optimizer": device_bytes(state.opt_state),
        "gradients": device_bytes(state.model) * (2 if config.accumulate > 1 else 1),
        "activations": activations,
        "optimal_s": _known_seconds(cost.get("optimal_seconds", 0.0)),
        "cost_flops": cost.get("flops", 0.0),
        "flops": hlo.flops(program),
        "cycles": hlo.estimated_cycles(program),
        "collectives": [
            dataclasses.asdict(c) for c in hlo.collectives(program, mesh.axis_names, tuple(mesh.shape.values()))
        ],
        "cpu_s": used.ru_utime + used.ru_stime,
        "wall_s": time.monotonic() - started,
        "peak_rss": used.ru_maxrss * 1024,
        "jax": jax.__version__,
        "libtpu": libtpu,
    }


def abstract_arguments(config: Config, mesh):
    """State, batch and knobs of `train_step` on a mesh, with no array made."""
    import jax
    import jax.numpy as jnp

    from dsjax.state import Batch
    from dsjax.train.checkpoint import abstract
    from dsjax.train.schedule import Knobs
    from dsjax.train.step import init_state
    from sharding.rules import spec

    shape = config.accumulate, config.batch_size // config.accumulate, config.seq_len
    rows = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=jax.NamedSharding(mesh, spec(None, "batch", "seq")))
    everywhere = jax.NamedSharding(mesh, jax.P())
    knobs = {
        field.name: jax.ShapeDtypeStruct((), jnp.int32 if field.type in (int, "int") else jnp.float32,
                                         sharding=everywhere)
        for field in dataclasses.fields(Knobs)
    }  # fmt: skip
    return abstract(lambda: init_state(config), mesh), Batch(rows, rows, rows), knobs


def saved_bytes(config: Config, state, batch, knobs) -> int:
    """Bytes a device that the forward pass keeps for the backward pass, weights and their casts left out."""
    import jax

    from dsjax.precision import cast_weights
    from dsjax.train.loss import count, total_loss

    micro = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype, sharding=_without_first(a.sharding)), batch
    )

    def residuals(model, batch, whole, router_bias, mtp_weight):
        counts = count(whole, config.model.num_nextn_predict_layers)

        def loss(model):
            cast = cast_weights(model, config.compute.precision)
            return total_loss(cast, batch, router_bias, counts, mtp_weight, config)[0]

        return jax.vjp(loss, model)[1]

    weights = {(a.shape, _layout(a)) for a in jax.tree.leaves(state.model)}
    kept = jax.eval_shape(residuals, state.model, micro, batch, state.router_bias, knobs["mtp_weight"])
    leaves = [a for a in jax.tree.leaves(kept) if (a.shape, _layout(a)) not in weights]
    return sum(map(_shard_bytes, leaves))


def device_bytes(tree) -> int:
    """Bytes of a tree's arrays on one device."""
    import jax

    return sum(map(_shard_bytes, jax.tree.leaves(tree)))


def _shard_bytes(a) -> int:
    shape = a.sharding.shard_shape(a.shape) if a.sharding is not None else a.shape
    return math.prod(shape) * a.dtype.itemsize


def _layout(a) -> tuple:
    spec = tuple(a.sharding.spec) if a.sharding is not None else ()
    return spec + (None,) * (a.ndim - len(spec))


def _without_first(sharding):
    import jax

    return jax.NamedSharding(sharding.mesh, jax.P(*sharding.spec[1:]))


def _known_seconds(seconds: float) -> float:
    """The analysis's time without the -1 s that it puts down for every operation it knows nothing of."""
    return seconds - math.floor(seconds) if seconds < 0 else seconds


def _main(job: str, out: str) -> None:
    try:
        said = _run(json.loads(Path(job).read_text()))
    except ConfigError as error:
        said = {"refused": str(error)}
    Path(out).write_text(json.dumps(said))


if __name__ == "__main__":
    _main(*sys.argv[1:])
