"""Rows to other TPUs, a different number to each, in Pallas: every device writes its rows into its peers' memory.

A device meets its peers, starts one copy to each, of as many rows as there are, and waits for what it sends and what it
is sent. All copies are under way at once, each device's first to the next peer, so that none is written to by all.
`sharding.ragged.exchange` is the public function, and its "gather" the definition.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int, Shaped

_TILE_BYTES = 32  # of a column in a tile of memory: copies begin and end where tiles do


def row_alignment(dtype) -> int:
    """What rows of a format must begin at multiples of, to be copied."""
    return _TILE_BYTES // jnp.dtype(dtype).itemsize


def pallas_tpu(
    arrays: tuple[Shaped[Array, "S _"], ...],
    rows: int,
    out: tuple[Int[Array, "P"], Int[Array, "P"], Int[Array, "P"]],
    coming: Int[Array, "P"],
    devices: Int[Array, "P"],
    axis: str,
    *,
    alignment: int,
    collective_id: int,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Shaped[Array, "R _"], ...]:
    """[rows, _] of each array: what each of P peers has for this device, anything elsewhere. Within `shard_map`.

    out: where the rows to each peer begin, how many they are, and where they begin there. coming: how many come from
    each. devices: the peers' places along `axis`, this device's among them. Beginnings are multiples of `alignment`, a
    multiple of each array's `row_alignment`, and so are `rows` and S; numbers of rows are rounded up to it, so up to
    alignment - 1 rows after those asked for are copied too. collective_id: one of its own for exchanges among these
    groups of devices, which all make them in the same order.

    interpret: InterpretParams to run as TPUs would, on any platform, slowly. Raises ValueError for `rows` or S that is
    no multiple of `alignment`, and for an alignment that an array cannot have.
    """
    for a in arrays:
        if alignment % row_alignment(a.dtype):
            raise ValueError(f"alignment={alignment}: rows of {a.dtype} need a multiple of {row_alignment(a.dtype)}")
        if rows % alignment or a.shape[0] % alignment:
            raise ValueError(f"rows={a.shape[0]} to rows={rows}: expected multiples of alignment={alignment}")
    n_peers = devices.shape[0]
    me = jnp.argmax(devices == lax.axis_index(axis))
    order = (me + 1 + jnp.arange(n_peers)) % n_peers  # the next device first, itself last
    size, coming = (-(-a // alignment) * alignment for a in (out[1], coming))
    scalars = *(a[order] for a in (devices, out[0], size, out[2])), jnp.stack([jnp.sum(size), jnp.sum(coming)])
    in_place = [pl.BlockSpec(memory_space=pl.ANY)] * len(arrays)
    move = pl.pallas_call(
        functools.partial(_kernel, axis=axis, alignment=alignment),
        out_shape=[jax.ShapeDtypeStruct((rows, a.shape[1]), a.dtype) for a in arrays],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(),
            in_specs=in_place,
            out_specs=in_place,
            scratch_shapes=[pltpu.SemaphoreType.DMA, pltpu.SemaphoreType.DMA],
        ),
        compiler_params=pltpu.CompilerParams(collective_id=collective_id, has_side_effects=True),
        interpret=interpret,
        name="exchange",
    )
    return tuple(move(*(a.astype(jnp.int32) for a in scalars), *arrays))


def _kernel(device, at, size, there, totals, *refs, axis, alignment):
    n_peers, n = device.shape[0], len(refs) // 2 - 1
    sources, targets, (sent, arrived) = refs[:n], refs[n : 2 * n], refs[2 * n :]

    # A peer's result has its place in memory only while the peer is in here. One that is ahead may signal for the next
    # exchange while another still waits in this one, and is counted here. No harm: when the first goes on from the k-th
    # nobody has signalled more than k times, so everyone has k times, and is in here.
    barrier = pltpu.get_barrier_semaphore()
    pl.loop(0, n_peers)(lambda p: pl.semaphore_signal(barrier, 1, device_id={axis: device[p]}))
    pl.semaphore_wait(barrier, n_peers)

    def rows(begin, number):
        return pl.ds(pl.multiple_of(begin, alignment), pl.multiple_of(number, alignment))

    @pl.loop(0, n_peers)
    def _(p):
        @pl.when(size[p] > 0)
        def _():
            mine, theirs, peer = rows(at[p], size[p]), rows(there[p], size[p]), {axis: device[p]}
            for source, target in zip(sources, targets):
                pltpu.make_async_remote_copy(source.at[mine], target.at[theirs], sent, arrived, peer).start()

    def wait(semaphore, arrays, total):
        @pl.when(total > 0)
        def _():
            for array in arrays:
                copied = array.at[rows(0, total)]  # not where, only how much: to wait is to count bytes
                pltpu.make_async_copy(copied, copied, semaphore).wait()

    wait(sent, sources, totals[0])
    wait(arrived, targets, totals[1])
