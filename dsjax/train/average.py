"""The moving average of the weights: in host memory, as V3 keeps it (reference section 6.4), or by the step itself.

    state, average = begin(config, state)
    state = step(state); average.add(state)    # after every step
    checkpoints.save(average.join(state))      # the state with the average of its own step

Copies of the weights leave the devices while the next step runs there, and a thread averages them in order: the average
is a function of the steps alone, as that on the devices is, whose numbers it has but for rounding in float32.
"""

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np

from dsjax.config import Config
from dsjax.state import TrainState

_AHEAD = 2  # copies of the weights that may wait in host memory
_BLOCK = 1 << 15  # numbers averaged at a time: they stay in a core's cache


class DeviceAverage:
    """Nothing to do: the step keeps the average, or there is none."""

    def add(self, state: TrainState) -> None:
        """Tells of a step that was sent."""

    def join(self, state: TrainState) -> TrainState:
        """The state with its average, of the same step."""
        return state


class HostAverage(DeviceAverage):
    """Each process keeps those parts of the average that its own devices hold of the weights.

    Steps that were skipped, and steps sent in vain, which leave state.step as it was, do not count, as on the devices.
    """

    def __init__(self, decay: float, start, step: int):
        self.step, self._decay = step, decay
        self._parts = [{_key(s): np.array(s.data) for s in a.addressable_shards} for a in jax.tree.leaves(start)]
        self._pool, self._pending = ThreadPoolExecutor(1, "average"), deque[Future]()

    def add(self, state: TrainState) -> None:
        """Sends the weights to the host; returns at once, unless two copies are waiting there already."""
        parts = [
            part for a in jax.tree.leaves(state.model) for part in {_key(s): s for s in a.addressable_shards}.values()
        ]
        counts = state.step.addressable_shards[0], state.skipped_in_a_row.addressable_shards[0]
        while len(self._pending) >= _AHEAD:
            self._pending.popleft().result()
        # Copies of their own, as the next step gives up the memory of these.
        copies = _to_host([part.data for part in (*counts, *parts)])
        self._pending.append(self._pool.submit(self._take, copies))

    def join(self, state: TrainState) -> TrainState:
        """The state with the average of its step, on the devices, where gradients have room during a step."""
        while self._pending:
            self._pending.popleft().result()
        if self.step != int(state.step):
            raise RuntimeError(f"the average is of step {self.step}, the state of step {int(state.step)}")
        leaves, tree = jax.tree.flatten(state.model)
        return state.replace(ema=jax.tree.unflatten(tree, map(self._on_devices, self._parts, leaves)))

    def _take(self, copies: list[jax.Array]) -> None:
        step, skipped, *weights = copies
        if int(step) == self.step:
            return
        if int(step) != self.step + 1:
            raise RuntimeError(f"the average is of step {self.step} and was given step {int(step)}")
        self.step += 1
        if not int(skipped):
            for value, w in zip((value for parts in self._parts for value in parts.values()), weights, strict=True):
                _average(value.reshape(-1), np.asarray(w).reshape(-1), self._decay)

    @staticmethod
    def _on_devices(parts: dict, like: jax.Array) -> jax.Array:
        # A CPU's "device" takes the very memory of a NumPy array, and the next step's average is written there.
        shards = [jax.device_put(parts[_key(s)].copy(), s.device) for s in like.addressable_shards]
        return jax.make_array_from_single_device_arrays(like.shape, like.sharding, shards)


def begin(config: Config, state: TrainState) -> tuple[TrainState, DeviceAverage]:
    """The state as the step takes it, and its average, which goes on from state.ema, or starts at the weights."""
    if config.optimizer.ema_decay is None or config.optimizer.ema_on == "device":
        return state, DeviceAverage()
    start = state.model if state.ema is None else state.ema
    return state.replace(ema=None), HostAverage(config.optimizer.ema_decay, start, int(state.step))


def _average(value: np.ndarray, w: np.ndarray, decay: float) -> None:
    """decay * value + (1 - decay) * w in float32, in place."""
    old, new = np.float32(decay), np.float32(1 - decay)
    part = np.empty(min(_BLOCK, value.size), np.float32)
    for i in range(0, value.size, _BLOCK):
        block = value[i : i + _BLOCK]
        block *= old
        block += np.multiply(w[i : i + _BLOCK], new, out=part[: block.size])


def _to_host(arrays: list[jax.Array]) -> list[jax.Array]:
    """Copies in the host memory that is next to each array's device; they need not be there yet."""
    return jax.device_put(arrays, [_host_memory(a.devices()) for a in arrays], may_alias=False)


def _host_memory(devices: Iterable) -> jax.sharding.Sharding:
    (device,) = devices
    kinds = [memory.kind for memory in device.addressable_memories()]
    kind = next((kind for kind in ("pinned_host", "unpinned_host") if kind in kinds), None)
    return jax.sharding.SingleDeviceSharding(device, memory_kind=kind)


def _key(shard) -> tuple:
    """Which part of the array it is."""
    return tuple((s.start, s.stop) for s in shard.index)
