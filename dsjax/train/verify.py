"""Whether a checkpoint holds what was written: sums of every leaf, and slices read back from the disk.

The sums travel with the checkpoint. They are sums of whole numbers, so that any mesh gives the same.
"""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsjax.config import ConfigError
from dsjax.train.leaves import LeafFolder
from sharding.mesh import make_mesh

SAMPLES = 8  # slices a checkpoint and process
SAMPLE_ELEMENTS = 1 << 16
_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}

# Leaf name -> (place of the slice in the whole leaf, what was there when the checkpoint was written).
Samples = dict[str, tuple[tuple[slice, ...], np.ndarray]]


def word_sum(a: jax.Array) -> jax.Array:
    """[] uint32: the sum, modulo 2**32, of an array's bit patterns. One flipped bit changes it."""
    return jnp.sum(lax.bitcast_convert_type(a, _WORDS[a.dtype.itemsize]), dtype=jnp.uint32)


def leaf_sums(flat: dict[str, Any]) -> dict[str, int]:
    """The sum of every leaf that is on devices, by name."""
    on_devices = {name: a for name, a in flat.items() if isinstance(a, jax.Array)}
    here = jax.default_backend() == "cpu" and jax.process_count() == 1
    sums = {n: _host_sum(a) for n, a in on_devices.items()} if here else jax.device_get(_sums(on_devices))
    return {name: int(value) for name, value in sums.items()}


@jax.jit
def _sums(flat):
    return jax.tree.map(word_sum, flat)


def _host_sum(a: jax.Array) -> np.uint32:
    """word_sum of an array in this process's memory, which NumPy reads 15 times as fast as XLA's program."""
    parts = (np.ascontiguousarray(s.data).reshape(-1) for s in a.addressable_shards if s.replica_id == 0)
    return np.sum([np.sum(p.view(f"u{p.itemsize}"), dtype=np.uint32) for p in parts], dtype=np.uint32)


def differing(flat: dict[str, Any], sums: dict[str, int]) -> list[str]:
    """Names of the leaves whose sum is another than it was."""
    return [name for name, value in leaf_sums(flat).items() if sums.get(name, value) != value]


def take_samples(flat: dict[str, Any], seed: int) -> Samples:
    """A few small slices of what this process holds, drawn by seed; [index, values] by leaf name."""
    draw = np.random.default_rng(seed)
    leaves = sorted(name for name, a in flat.items() if isinstance(a, jax.Array) and a.addressable_shards)
    chosen = draw.choice(leaves, min(SAMPLES, len(leaves)), replace=False) if leaves else []
    samples = {}
    for name in map(str, chosen):
        a = flat[name]
        shard = a.addressable_shards[0]
        sizes = _small(shard.data.shape)
        start = [int(draw.integers(n - size + 1)) for n, size in zip(shard.data.shape, sizes)]
        begin = [axis.indices(n)[0] for axis, n in zip(shard.index, a.shape)]
        index = tuple(slice(b + s, b + s + size) for b, s, size in zip(begin, start, sizes))
        samples[name] = index, _slice(shard, start, sizes)
    return samples


def check_samples(step_folder: Path, item_of: dict[str, str], samples: Samples) -> list[str]:
    """Names of the samples that the disk does not give back; `item_of` says in which item a leaf is."""
    wrong = []
    for name, (index, values) in samples.items():
        try:
            read = np.asarray(LeafFolder(step_folder, item_of[name]).open(name)[index].read().result())
        except (ConfigError, ValueError, OSError):
            wrong.append(name)
            continue
        if read.tobytes() != values.tobytes():
            wrong.append(name)
    return wrong


def _slice(shard, start: list[int], sizes: tuple[int, ...]) -> np.ndarray:
    """A copy of a part of what a device holds, without the rest."""
    if shard.device.platform == "cpu":  # a view, with nothing to compile
        return np.asarray(shard.data)[(*(slice(s, s + n) for s, n in zip(start, sizes)), ...)].copy()
    with jax.set_mesh(make_mesh([shard.device])):  # beside the run's mesh, on this device alone
        return np.asarray(lax.dynamic_slice(shard.data, start, sizes))


def _small(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape cut down, first dimensions first, to at most SAMPLE_ELEMENTS elements."""
    sizes = list(shape)
    for axis in range(len(sizes)):
        rest = math.prod(sizes[axis + 1 :])
        sizes[axis] = max(1, min(sizes[axis], SAMPLE_ELEMENTS // max(rest, 1)))
    return tuple(sizes)
