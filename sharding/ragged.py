"""Rows to other devices, a different number to each: `lax.ragged_all_to_all`, and the same where a backend lacks it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped

IMPLEMENTATION_BY_PLATFORM = {"cpu": "gather", "gpu": "ragged", "tpu": "ragged"}


class Side(NamedTuple):
    """One side's part of an exchange with P peers: [P] int32 each."""

    at: jax.Array  # where the rows to, or from, each peer begin in this device's array
    size: jax.Array  # how many
    there: jax.Array  # where they begin in the peer's array


def exchange(
    x: Shaped[Array, "S D"],
    rows: int,
    out: Side,
    back: Side,
    axis: str,
    peers: tuple[tuple[int, ...], ...] | None = None,
    implementation: str = "auto",
) -> Shaped[Array, "R D"]:
    """[rows, D]: from each peer the rows of its x that it has for this device, zeros elsewhere. Within `shard_map`.

    `out` says what this device sends, `back` what it receives; they must agree with the peers'. `peers` are the groups
    of devices along `axis` that exchange among themselves (all of them, if not given). No gradient of its own: swap the
    sides. implementation: "ragged", "gather" (the peers' whole arrays, for backends that have no ragged one) or "auto",
    by platform; any other name raises ValueError.
    """
    if choose(implementation) == "ragged":
        sizes = out.at, out.size, out.there, back.size
        arrived = lax.ragged_all_to_all(
            x, lax.empty((rows, x.shape[1]), x.dtype), *sizes, axis_name=axis, axis_index_groups=peers
        )
        return jnp.where((jnp.arange(rows) < jnp.sum(back.size))[:, None], arrived, 0)
    row = jnp.arange(rows)[:, None]
    of_peer = (row >= back.at) & (row < back.at + back.size)  # [rows, P]
    peer = jnp.argmax(of_peer, axis=1)
    place = jnp.where(jnp.any(of_peer, axis=1), back.there[peer] + row[:, 0] - back.at[peer], x.shape[0])
    everything = lax.all_gather(x, axis, axis_index_groups=peers)
    return everything.at[peer, place].get(mode="fill", fill_value=0)


def choose(implementation: str) -> str:
    """The implementation that a name stands for. Raises ValueError for an unknown one."""
    if implementation == "auto":
        return IMPLEMENTATION_BY_PLATFORM[jax.default_backend()]
    if implementation not in IMPLEMENTATION_BY_PLATFORM.values():
        raise ValueError(f"implementation={implementation!r}: choose one of auto, gather, ragged")
    return implementation
