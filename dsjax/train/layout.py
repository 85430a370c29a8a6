"""Where a run's arrays live: the devices, their mesh, and batches laid out on it."""

from collections.abc import Mapping

import jax
import numpy as np

from dsjax.config import Config, ConfigError
from dsjax.state import Batch
from sharding.mesh import MeshError, make_mesh
from sharding.rules import spec


def devices() -> list:
    """This job's devices; to be called before any other use of them. Raises ConfigError if there are none."""
    # Programs of several CPU devices that run at once can wait for each other without end; accelerators ignore this.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        return jax.devices()
    except RuntimeError as error:
        raise ConfigError(f"no devices: {str(error).splitlines()[0]}") from None


def device_mesh(config: Config):
    """The mesh of a configuration on this job's devices. Raises ConfigError with the arithmetic if it cannot be."""
    try:
        mesh = make_mesh(devices(), **vars(config.mesh))
    except MeshError as error:
        raise ConfigError(str(error)) from None
    check_mesh(config, mesh.shape)
    return mesh


def check_mesh(config: Config, shape: Mapping[str, int]) -> None:
    """Raises ConfigError with the arithmetic where a mesh of this shape does not divide what it is to cut."""
    m = config.model
    kv_rank = m.kv_lora_rank if m.attention == "mla" else 0
    rows = shape["data"] * shape["fsdp"] * shape["expert"]
    for field, value, axes, size in (
        ("batch_size / accumulate", config.batch_size // config.accumulate, "data * fsdp * expert", rows),
        ("seq_len", config.seq_len, "context", shape["context"]),
        ("model.n_routed_experts", m.n_routed_experts, "expert", shape["expert"]),
        ("model.hidden_size", m.hidden_size, "fsdp * expert", shape["fsdp"] * shape["expert"]),
        ("model.kv_lora_rank", kv_rank, "fsdp", shape["fsdp"]),
        ("model.q_lora_rank", m.q_lora_rank or 0, "fsdp", shape["fsdp"]),
        ("model.num_attention_heads", m.num_attention_heads, "tensor", shape["tensor"]),
        ("model.intermediate_size", m.intermediate_size, "tensor", shape["tensor"]),
        ("model.moe_intermediate_size", m.moe_intermediate_size, "tensor", shape["tensor"]),
        ("model.vocab_size", m.vocab_size, "tensor", shape["tensor"]),
        ("the number of pipeline stages", 1, "stage", shape["stage"]),
    ):
        if value % size:
            raise ConfigError(f"mesh: {axes} = {size} does not divide {field} = {value}")


def on_mesh(arrays: dict[str, np.ndarray], mesh, *, whole: bool = False) -> Batch:
    """A Batch [..., B, T] laid out on the mesh, from this process's rows, or from all rows if `whole`."""
    names = (*(None,) * (arrays["tokens"].ndim - 2), "batch", "seq")
    sharding = jax.NamedSharding(mesh, spec(*names))

    def place(a: np.ndarray) -> jax.Array:
        return jax.device_put(a, sharding) if whole else jax.make_array_from_process_local_data(sharding, a)

    return Batch(*(place(arrays[name]) for name in ("tokens", "segment_ids", "positions")))


def one_document(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rows as V3's pre-training sees them: one document each, attention across what was packed together."""
    segment_ids = np.minimum(arrays["segment_ids"], 1)
    positions = np.broadcast_to(np.arange(segment_ids.shape[-1], dtype=np.int32), segment_ids.shape)
    return arrays | {"segment_ids": segment_ids, "positions": positions}
