"""Silent data corruption: a micro-batch's gradients computed twice, on two layouts of the devices, bit for bit.

The second layout gives every part of the work to the next device of its process. What a device computes wrong, or holds
wrong, then lands in another part of the gradients, and the sums of their bits differ.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.config import Config
from dsjax.state import Batch, TrainState
from dsjax.train.checkpoint import names
from dsjax.train.step import micro_gradients
from dsjax.train.verify import word_sum
from sharding.mesh import AXES

# A device, and the bit of the first element of its part of every weight that it holds flipped.
Fault = tuple[jax.Device, int]


class CorruptionCheck:
    """The check of a run: a call gives the weights whose gradients differ, [] if all is well.

    It holds a second copy of the weights and one more gradient while it runs. Compiled twice, once a layout.
    """

    def __init__(self, config: Config, mesh: jax.sharding.Mesh):
        self.mesh, self.next_device = mesh, _neighbours(mesh)
        moved = np.vectorize(self.next_device.get, otypes=[object])(mesh.devices)
        self.moved = jax.sharding.Mesh(moved, AXES, axis_types=mesh.axis_types)
        self.sums = jax.jit(functools.partial(gradient_sums, config=config))

    def __call__(self, state: TrainState, batch: Batch, mtp_weight: float, fault: Fault | None = None) -> list[str]:
        """The first micro-batch of [A, B, T] is taken. `fault` makes a device faulty, for a test of this test."""
        given = state.model, state.router_bias, batch
        with jax.set_mesh(self.moved):
            again = self.sums(*_faulty(jax.tree.map(self._move, given), fault), jnp.float32(mtp_weight))
        with jax.set_mesh(self.mesh):
            first = self.sums(*_faulty(given, fault), jnp.float32(mtp_weight))
        differ = jax.device_get(first) != jax.device_get(again)
        return [name for name, bad in zip([*names(state.model), "loss"], differ) if bad]

    def _move(self, a: jax.Array) -> jax.Array:
        """The same array, each part of it on the next device."""
        sharding = jax.NamedSharding(self.moved, a.sharding.spec)
        parts = [jax.device_put(shard.data, self.next_device[shard.device]) for shard in a.addressable_shards]
        return jax.make_array_from_single_device_arrays(a.shape, sharding, parts)


def gradient_sums(model, router_bias, batch: Batch, mtp_weight: jax.Array, config: Config) -> jax.Array:
    """[leaves + 1] uint32: sums of the bits of every weight's gradient, and of the loss."""
    micro = jax.tree.map(lambda a: a[:1], batch)
    grads, parts = micro_gradients(model, router_bias, micro, mtp_weight, config)
    return jnp.stack([*map(word_sum, jax.tree.leaves(grads)), word_sum(parts.loss)])


def flip_bit(a: jax.Array, device: jax.Device, bit: int) -> jax.Array:
    """The array with one bit of the first element of the device's part flipped."""

    def part(shard):
        if shard.device != device:
            return shard.data
        data = np.array(shard.data)
        data.view(f"u{data.dtype.itemsize}").flat[0] ^= 1 << bit
        return jax.device_put(data, device)

    return jax.make_array_from_single_device_arrays(a.shape, a.sharding, [part(s) for s in a.addressable_shards])


def _faulty(given: tuple, fault: Fault | None) -> tuple:
    if fault is None:
        return given
    model, *rest = given
    return jax.tree.map(lambda a: flip_bit(a, *fault), model), *rest


def _neighbours(mesh) -> dict[jax.Device, jax.Device]:
    """Every device's next one of the same process, in the mesh's order; the last one's is the first."""
    devices = mesh.devices.ravel()
    following = {}
    for process in {d.process_index for d in devices}:
        own = [d for d in devices if d.process_index == process]
        following |= dict(zip(own, [*own[1:], own[0]]))
    return following
