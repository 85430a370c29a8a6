"""Where a run's arrays live: the devices, their mesh, and batches laid out on it."""

import dataclasses
import math
from collections.abc import Iterable, Mapping

import jax
import numpy as np

from dsjax.config import Config, ConfigError
from dsjax.state import Batch
from dsjax.train.processes import check_joined
from sharding.mesh import MeshError, divisors, make_mesh
from sharding.rules import RULES, spec

# Of the choices in `compute`, those that not every platform has.
ONLY_ON = (
    ("grouped_matmul", "pallas_tpu", ["tpu"]),
    ("grouped_matmul", "pallas_gpu", ["gpu"]),
    ("scaled_matmul", "pallas_tpu", ["tpu"]),
    ("scaled_matmul", "pallas_gpu", ["gpu"]),
    ("attention", "splash", ["tpu"]),
    ("attention", "cudnn", ["gpu"]),
    ("latent_attention", "pallas_tpu", ["tpu"]),
    ("latent_attention", "pallas_gpu", ["gpu"]),
    ("exchange", "ragged", ["tpu", "gpu"]),
    ("exchange", "pallas_tpu", ["tpu"]),
)


def devices() -> list:
    """This job's devices; to be called before any other use of them. Raises ConfigError if there are none."""
    # Programs of several CPU devices that run at once can wait for each other without end; accelerators ignore this.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        found = jax.devices()
    except RuntimeError as error:
        raise ConfigError(f"no devices: {str(error).splitlines()[0]}") from None
    check_joined()
    return found


def device_mesh(config: Config):
    """The mesh of a configuration on this job's devices. Raises ConfigError with the arithmetic if it cannot be, and
    where the configuration asks for what these devices cannot run."""
    platform = devices()[0].platform
    for name, value, runs_on in ONLY_ON:
        if getattr(config.compute, name) == value and platform not in runs_on:
            raise ConfigError(
                f"compute.{name}={value}: runs on {' and '.join(runs_on)}, here is {platform}; auto chooses"
            )
    try:
        mesh = make_mesh(devices(), **vars(config.mesh))
    except MeshError as error:
        raise ConfigError(str(error)) from None
    check_mesh(config, mesh.shape)
    return mesh


def check_mesh(config: Config, shape: Mapping[str, int]) -> None:
    """Raises ConfigError with the arithmetic where a mesh of this shape does not divide what it is to cut."""
    m, n_devices = config.model, math.prod(shape.values())
    rows, cut = ({axis: shape[axis] for axis in axes} for axes in (RULES["batch"], RULES["embed"]))
    for field, value, sizes in (
        ("batch_size / accumulate", config.batch_size // config.accumulate, rows),
        ("seq_len", config.seq_len, {"context": shape["context"]}),
        ("model.n_routed_experts", m.n_routed_experts, {"expert": shape["expert"]}),
        ("model.hidden_size", m.hidden_size, cut),
        ("model.kv_lora_rank", m.kv_lora_rank if m.attention == "mla" else 0, {"fsdp": shape["fsdp"]}),
        ("model.q_lora_rank", m.q_lora_rank or 0, {"fsdp": shape["fsdp"]}),
        ("model.num_attention_heads", m.num_attention_heads, {"tensor": shape["tensor"]}),
        ("model.intermediate_size", m.intermediate_size, {"tensor": shape["tensor"]}),
        ("model.moe_intermediate_size", m.moe_intermediate_size, {"tensor": shape["tensor"]}),
        ("model.vocab_size", m.vocab_size, {"tensor": shape["tensor"]}),
        ("the number of pipeline stages", 1, {"stage": shape["stage"]}),
    ):
        size = math.prod(sizes.values())
        if value % size:
            near = min((d for d in divisors(n_devices) if value % d == 0), key=lambda d: abs(math.log(d / size)))
            used = [f"{axis}={n}" for axis, n in sizes.items() if n > 1]
            product = " * ".join(used) + f" = {size}" * (len(used) > 1)
            raise ConfigError(
                f"mesh: {product} does not divide {field} = {value}; of what divides the {n_devices} devices, the "
                f"nearest that does is {near}"
            )
    groups, own = config.compute.expert_groups, config.batch_size // config.accumulate // math.prod(rows.values())
    if shape["expert"] % groups:
        raise ConfigError(f"compute.expert_groups={groups}: expected a divisor of mesh.expert={shape['expert']}")
    if config.compute.overlap == "batch-split" and own % 2:
        raise ConfigError(
            f"compute.overlap=batch-split: expected an even number of rows on a device, got {own} "
            f"(batch_size / accumulate / (data * fsdp * expert))"
        )


@dataclasses.dataclass(frozen=True)
class Share:
    """The rows of a batch that a process reads: those of which its devices hold a part.

    Processes may share rows, where `context` or `tensor` runs across them; the mesh decides, not a process's number.
    """

    rows: tuple[int, ...]  # rising
    total: int  # rows of the whole batch

    def part(self, a: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        """A device's part, whose index in the whole [..., total, T] is given, of the share [..., len(rows), T]."""
        *whole, rows, tokens = index
        here = np.searchsorted(self.rows, range(*rows.indices(self.total)))
        return a[(*whole, here)][..., tokens]


def share_of(devices: Iterable, mesh, total: int) -> Share:
    """The rows of a batch of `total` that these devices of a mesh need."""
    places = jax.NamedSharding(mesh, spec("batch")).devices_indices_map((total,))
    return Share(tuple(sorted({row for d in devices for row in range(*places[d][0].indices(total))})), total)


def on_mesh(arrays: dict[str, np.ndarray], mesh, share: Share | None = None) -> Batch:
    """A Batch [..., B, T] laid out on the mesh, from this process's share of its rows; from all rows, without one.

    What a teacher says has one axis more.
    """
    *whole, n, length = arrays["tokens"].shape
    share = share or Share(tuple(range(n)), n)
    axes, shape = (*(None,) * len(whole), "batch", "seq"), (*whole, share.total, length)

    def place(a: np.ndarray) -> jax.Array:
        more = a.shape[len(shape) :]
        sharding = jax.NamedSharding(mesh, spec(*axes, *(None,) * len(more)))

        def part(index: tuple[slice, ...]) -> np.ndarray:
            if not more:
                return share.part(a, index)
            last_first = share.part(np.moveaxis(a, -1, 0), (index[-1], *index[:-1]))
            return np.moveaxis(last_first, 0, -1)

        return jax.make_array_from_callback((*shape, *more), sharding, part)

    return Batch(**{name: place(a) for name, a in arrays.items()})


def one_document(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rows as V3's pre-training sees them: one document each, attention across what was packed together."""
    segment_ids = np.minimum(arrays["segment_ids"], 1)
    positions = np.broadcast_to(np.arange(segment_ids.shape[-1], dtype=np.int32), segment_ids.shape)
    return arrays | {"segment_ids": segment_ids, "positions": positions}
