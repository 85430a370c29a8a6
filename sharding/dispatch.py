"""Tokens to the devices that own their experts, and back. Called inside `jax.shard_map`; arrays are one device's part.

A token's row goes once to each device that owns one of its experts, with its choices beside it, and is spread there to
pairs (row, expert). Where the devices along `expert` form groups, joined by a slow network, a row crosses once to each
group that it needs, to the device of its sender's own place there, and fans out inside (arXiv:2412.19437, section
3.2.2). Results return by the same ways, summed where rows had been copied.

Shapes are fixed, so rows arrive in buffers, whose sizes `Buffers` sets. What does not fit is left out and counted.
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, UInt8

from pallas_kernels.quantise import E4M3, Quantised, Tile, dequantise, quantise
from sharding.ragged import Side, exchange, row_alignment

_AXIS = "expert"
_WIRE = Tile(1, 128, ue8m0=True)  # powers of two: quantising again on the way changes nothing
_MULTIPLE = 8  # of rows, for buffers that are not as large as they can be


class Buffers(NamedTuple):
    """How many rows the buffers hold, and how they are filled."""

    factor: float | None = None  # times the rows of even loads; None: as many as can come, nothing is ever left out
    cheap: int = 0  # rows for which there is always room
    groups: int = 1  # of the devices along `expert`; a row crosses to each group once
    topk_groups: int | None = None  # the most groups that a token's experts lie in; None for any number
    exchange: str = "auto"  # implementation of `sharding.ragged.exchange`
    alignment: int = 1  # every expert's pairs begin at a multiple of it, zeros between them
    fp8: bool = False  # rows travel to experts in FP8, and so do the gradients of what experts return

    def rows(self, even: int | float, most: int) -> int:
        """Size of a buffer to which `even` rows come with even loads, and `most` at most."""
        if self.factor is None:
            return most
        return min(most, max(self.cheap, -(-math.ceil(self.factor * even) // _MULTIPLE) * _MULTIPLE))


class Fan(NamedTuple):
    """Rows and the copies made of them; a number past the end stands for none."""

    row: jax.Array  # [S] int32, of each copy
    copies: jax.Array  # [m, R] int32, of each row


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["fan", "out", "back"],
    meta_fields=["rows", "peers", "implementation", "alignment", "fp8"],
)
@dataclass(frozen=True)
class Way:
    """How rows were copied, sorted by peer and sent."""

    fan: Fan
    out: Side
    back: Side
    rows: int  # of the buffer that they arrive in
    peers: tuple[tuple[int, ...], ...]  # groups of devices that exchange among themselves
    implementation: str
    alignment: int  # rows to and from a peer begin at multiples of it
    fp8: bool  # tokens' rows that `_send` sends; what returns is as it is


class Plan(NamedTuple):
    """What the experts have to do, and what `combine` needs to know."""

    ways: tuple[Way, ...]
    fan: Fan  # rows that arrived to pairs (row, expert), sorted by expert
    group_sizes: jax.Array  # [E_local] int32, pairs of each local expert
    overflow: jax.Array  # [] int32, rows and pairs of this device that did not fit


def dispatch(
    x: Float[Array, "N D"],
    indices: Int[Array, "N K"],
    weights: Float[Array, "N K"],
    n_local_experts: int,
    buffers: Buffers = Buffers(),
) -> tuple[Float[Array, "M D"], Float[Array, "M"], Plan]:
    """Each pair's row and weight, sorted by local expert, and the plan to bring results back.

    A token's indices are different ones. M is set by `buffers`; places between experts and after the last pair are
    zeros, and those between them count as pairs of the expert before.
    """
    (n, k), n_devices = indices.shape, lax.axis_size(_AXIS)
    inner = n_devices // buffers.groups  # devices of a group
    to_groups = min(buffers.groups, k, buffers.topk_groups or k)
    here = n  # rows, of which x has more where gaps align them
    # With a row travel its weights and its choices, these counted from 1 (0 is none), in float32: exact up to 2**24.
    said = jnp.concatenate([weights, lax.stop_gradient(indices + 1).astype(weights.dtype)], axis=1)
    ways, lost = [], [jnp.int32(0)]
    me = lax.axis_index(_AXIS)

    def choices() -> Int[Array, "K R"]:  # rows last, as all that follows: TPUs pad the last dimension to 128
        return said[:, k:].T.astype(jnp.int32) - 1

    def owners() -> Int[Array, "K R"]:
        return jnp.where(choices() >= 0, choices() // n_local_experts, -1)

    if buffers.groups > 1:
        peers = tuple(tuple(range(i, n_devices, inner)) for i in range(inner))
        arriving = buffers.rows(n * to_groups, n * buffers.groups)
        way, left = _way(owners() // inner, peers, to_groups, n * to_groups, arriving, buffers, x.dtype)
        x, said = _send((x, said), way)
        ways, lost, here = [*ways, way], [*lost, left], arriving
    if inner > 1:
        peers = tuple(tuple(range(i, i + inner)) for i in range(0, n_devices, inner))
        place = jnp.where(owners() // inner == me // inner, owners() % inner, -1)
        copies = min(k, inner)
        even = n * to_groups * inner * (1 - (1 - 1 / inner) ** (k / to_groups))  # choices at random
        leaving = buffers.rows(even, here * copies) if ways else here * copies
        arriving = buffers.rows(even, here * inner)
        way, left = _way(place, peers, copies, leaving, arriving, buffers, x.dtype)
        x, said = _send((x, said), way)
        ways, lost, here = [*ways, way], [*lost, left], arriving
    if ways:  # not to be sent again
        said = checkpoint_name(said, "dispatched")
        x = x if buffers.fp8 else checkpoint_name(x, "dispatched")

    size = buffers.rows(n * k, here * min(k, n_local_experts)) if ways else n * k
    own = choices() - me * n_local_experts == jnp.arange(n_local_experts)[:, None, None]  # [E_local, K, R]
    place, fits, group_sizes = _in_order(jnp.any(own, axis=1), size, buffers.alignment)
    size = _with_gaps(size, n_local_experts, buffers.alignment)
    places = jnp.min(jnp.where(own, place[:, None], size), axis=0)  # [K, R]
    pairs, fan = _fan(places, size)
    pair_weights = _spread(said[:, :k].T.reshape(-1), Fan(pairs, places.reshape(1, -1)))
    left = jnp.sum(own, dtype=jnp.int32) - jnp.sum(fits)
    return _spread(x, fan), pair_weights, Plan(tuple(ways), fan, group_sizes, sum([*lost, left]))


def combine(y: Float[Array, "M D"], plan: Plan) -> Float[Array, "N D"]:
    """Sum of each token's pairs, at the token's device. Pairs are already weighted."""
    y = _collect(y, plan.fan)
    for way in reversed(plan.ways):
        (y,) = _return((y,), way)
    return lax.psum(y, "tensor")


def _way(
    to: Int[Array, "K R"], peers, copies: int, leaving: int, arriving: int, buffers: Buffers, dtype
) -> tuple[Way, Int[Array, ""]]:
    """How each row goes to the peers named in `to` (negative for none), once to each; and how many did not fit."""
    n_peers, align = len(peers[0]), row_alignment(buffers.exchange, jnp.uint8 if buffers.fp8 else dtype)
    wanted = jnp.any(to == jnp.arange(n_peers)[:, None, None], axis=1)  # [P, R]
    place, sizes, _ = _in_order(wanted, leaving, align)
    nth = jnp.where(wanted, jnp.cumsum(wanted, axis=0), 0) == 1 + jnp.arange(copies)[:, None, None]  # [copies, P, R]
    held = _with_gaps(leaving, n_peers, align)
    _, fan = _fan(jnp.min(jnp.where(nth, place, held), axis=1), held)

    sizes = lax.all_gather(sizes, _AXIS, axis_index_groups=peers)  # [sender, receiver]
    taken = jnp.minimum(sizes, arriving - jnp.minimum(_before(sizes, axis=0), arriving))
    starts = _before(_whole(sizes, align), axis=1)  # at the sender
    lands = _before(_whole(taken, align), axis=0)  # at the receiver
    me = jnp.argmax(jnp.asarray(peers) == lax.axis_index(_AXIS)) % n_peers
    out = Side(starts[me], taken[me], lands[me])
    back = Side(lands[:, me], taken[:, me], starts[:, me])
    lost = jnp.sum(wanted, dtype=jnp.int32) - jnp.sum(taken[me])
    rows = _with_gaps(arriving, n_peers, align)
    return Way(fan, out, back, rows, peers, buffers.exchange, align, buffers.fp8), lost


def _in_order(
    wanted: Bool[Array, "P R"], size: int, alignment: int = 1
) -> tuple[Int[Array, "P R"], Int[Array, "P"], Int[Array, "P"]]:
    """Where the rows that each of P wants stand among all that are wanted, P after P, each P's first at a multiple of
    `alignment`; and how many of each P's fit, without and with what fills them up to such a multiple.

    `size` rows fit, in as many places and those of the gaps. What is not wanted or does not fit stands past these.
    """
    place = jnp.cumsum(wanted.reshape(-1), dtype=jnp.int32).reshape(wanted.shape) - 1
    fits = wanted & (place < size)
    sizes = jnp.sum(fits, axis=1, dtype=jnp.int32)
    filled = _whole(sizes, alignment)
    if alignment > 1:
        place += _before(filled - sizes)[:, None]
    return jnp.where(fits, place, _with_gaps(size, len(wanted), alignment)), sizes, filled


def _with_gaps(size: int, n: int, alignment: int) -> int:
    """Places in which `size` rows fit, however they belong to n whose rows begin at multiples of `alignment`."""
    return (-(-size // alignment) + n * (alignment - 1) // alignment) * alignment


def _whole(sizes, alignment: int):
    return -(-sizes // alignment) * alignment


def _before(sizes, axis: int = 0):
    """Sums of what comes before each."""
    return jnp.cumsum(sizes, axis=axis) - sizes


def _fan(places: Int[Array, "m R"], size: int) -> tuple[Int[Array, "size"], Fan]:
    """Which copy (in the order of `places`, laid flat) is at each place, and the rows that they are copies of."""
    n, n_rows, flat = places.size, places.shape[1], places.reshape(-1)
    copy = jnp.arange(n, dtype=jnp.int32)
    # Indices that are all different, past the end too: others XLA would sort for TPUs.
    at = jnp.where(flat < size, flat, size + copy)
    copy = jnp.full((size,), n, jnp.int32).at[at].set(copy, mode="drop", unique_indices=True)
    return copy, Fan(jnp.where(copy < n, copy % n_rows, n_rows), places)


# Copying rows and summing copies are each other's gradient, and so are sending and returning. Both are written as
# gathers: the gradient of one by itself would be a scatter-add, row after row.
def _spread(x, fan):
    return x.at[fan.row].get(mode="fill", fill_value=0)


def _collect(y, fan):
    return jnp.sum(y.at[fan.copies].get(mode="fill", fill_value=0), axis=0)


def _send(arrays, way):
    """Copies of rows at their peers. The first array is the tokens' rows themselves."""
    x, *said = (_spread(a, way.fan) for a in arrays)
    sent = (_pack(x) if way.fp8 else x, *said)
    arrived, *said = exchange(sent, way.rows, way.out, way.back, _AXIS, way.peers, way.implementation, way.alignment)
    if way.fp8:
        arrived = _unpack(checkpoint_name(arrived, "dispatched"), x.shape[1], x.dtype)
    return arrived, *said


def _pack(x: Float[Array, "S D"]) -> UInt8[Array, "S P"]:
    """Rows in E4M3 with power-of-two scales for 128 values each, and behind them the scales' exponents, as bytes."""
    rows = quantise(x, _WIRE)
    exponents = lax.bitcast_convert_type(rows.scales, jnp.uint32) >> 23
    return jnp.concatenate([lax.bitcast_convert_type(rows.values, jnp.uint8), exponents.astype(jnp.uint8)], axis=1)


def _unpack(packed: UInt8[Array, "S P"], width: int, dtype) -> Float[Array, "S D"]:
    """Rows of `width` values; of a row of zero bytes, zeros."""
    values = lax.bitcast_convert_type(packed[:, :width], E4M3)
    scales = lax.bitcast_convert_type(packed[:, width:].astype(jnp.uint32) << 23, jnp.float32)
    return dequantise(Quantised(values, scales, _WIRE), dtype)


def _return(arrays, way):
    n_copies = way.fan.row.shape[0]
    back = exchange(arrays, n_copies, way.back, way.out, _AXIS, way.peers, way.implementation, way.alignment)
    return tuple(_collect(a, way.fan) for a in back)


def _transposes(one, other):
    """Both functions of (array, plan) with each other as gradient."""
    pair = []
    for forward, backward in ((one, other), (other, one)):
        linear = jax.custom_vjp(forward)
        linear.defvjp(lambda x, plan, f=forward: (f(x, plan), plan), lambda plan, dy, b=backward: (b(dy, plan), None))
        pair.append(linear)
    return pair


_spread, _collect = _transposes(_spread, _collect)
_send, _return = _transposes(_send, _return)
