"""Rows to other devices, a different number to each: `lax.ragged_all_to_all`, the same where a backend lacks it, and a
kernel for TPUs."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Shaped

from pallas_kernels import choice, exchange_tpu

IMPLEMENTATION_BY_PLATFORM = {"cpu": "gather", "gpu": "ragged", "tpu": "ragged"}
_KERNELS = {
    "pallas_tpu": exchange_tpu.pallas_tpu,
    "pallas_interpret": functools.partial(exchange_tpu.pallas_tpu, interpret=pltpu.InterpretParams()),
}


class Side(NamedTuple):
    """One side's part of an exchange with P peers: [P] int32 each."""

    at: jax.Array  # where the rows to, or from, each peer begin in this device's array
    size: jax.Array  # how many
    there: jax.Array  # where they begin in the peer's array


def exchange(
    arrays: tuple[Shaped[Array, "S _"], ...],
    rows: int,
    out: Side,
    back: Side,
    axis: str,
    peers: tuple[tuple[int, ...], ...] | None = None,
    implementation: str = "auto",
    alignment: int = 1,
) -> tuple[Shaped[Array, "R _"], ...]:
    """[rows, _] of each array: from each peer its rows for this device, zeros elsewhere. Within `shard_map`.

    `out` says what this device sends, `back` what it receives; they must agree with the peers'. `peers` are the groups
    of devices along `axis` that exchange among themselves (all of them, if not given). No gradient of its own: swap the
    sides.

    implementation: "ragged", "gather" (the peers' whole arrays, for backends that have no ragged one), "pallas_tpu",
    "pallas_interpret" (the same kernel on any platform, for tests) or "auto", by platform; any other name raises
    ValueError. The kernel needs an `alignment`, a multiple of `row_alignment`: each peer's rows begin at a multiple of
    it and have the places up to the next for themselves, at both ends, and S and `rows` are multiples of it. In one
    program, all its exchanges in groups of neighbours are in the same groups, and so are those in other groups.
    """
    name = choose(implementation)
    row = jnp.arange(rows)[:, None]
    of_peer = (row >= back.at) & (row < back.at + back.size)  # [rows, P]
    here = jnp.any(of_peer, axis=1)
    if name == "gather":
        peer = jnp.argmax(of_peer, axis=1)
        places = peer, jnp.where(here, back.there[peer] + row[:, 0] - back.at[peer], arrays[0].shape[0])
        everything = (lax.all_gather(a, axis, axis_index_groups=peers) for a in arrays)
        return tuple(a.at[places].get(mode="fill", fill_value=0) for a in everything)
    if name == "ragged":
        sizes = out.at, out.size, out.there, back.size
        move = functools.partial(lax.ragged_all_to_all, axis_name=axis, axis_index_groups=peers)
        arrived = [move(a, lax.empty((rows, a.shape[1]), a.dtype), *sizes) for a in arrays]
    else:
        groups = jnp.asarray(peers or [range(lax.axis_size(axis))])
        group = groups[jnp.argmax(jnp.any(groups == lax.axis_index(axis), axis=1))]
        options = {"alignment": alignment, "collective_id": _kind(peers)}
        arrived = _KERNELS[name](arrays, rows, out, back.size, group, axis, **options)
    return tuple(jnp.where(here[:, None], a, 0) for a in arrived)


def row_alignment(implementation: str, dtype) -> int:
    """What an implementation's rows of a format must begin at multiples of."""
    return exchange_tpu.row_alignment(dtype) if choose(implementation) in _KERNELS else 1


def choose(implementation: str) -> str:
    """The implementation that a name stands for. Raises ValueError for an unknown one."""
    return choice.choose(implementation, IMPLEMENTATION_BY_PLATFORM, ["gather", "ragged", *_KERNELS])


def _kind(peers: tuple[tuple[int, ...], ...] | None) -> int:
    """0 if all devices exchange with all, 1 if groups of neighbours do, 2 for other groups: each meets by itself."""
    if peers is None or len(peers) == 1:
        return 0
    return 1 if peers[0] == tuple(range(len(peers[0]))) else 2
