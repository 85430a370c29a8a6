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

_TILE_BYTES = 32  # of a column of one tile of memory, the least that a copy can begin at: 8 rows of float32


def row_alignment(dtype) -> int:
    """What rows of a format must begin at multiples of, to be copied."""
    return _TILE_BYTES // jnp.dtype(dtype).itemsize


def pallas_tpu(
    arrays: tuple[Shaped[Array, "S _"], ...],
    rows: int,
    out: tuple[Int[Array, "P"], Int[Array, "P"], Int[Array, "P"]],
    back: tuple[Int[Array, "P"], Int[Array, "P"], Int[Array, "P"]],
    devices: Int[Array, "P"],
    axis: str,
    *,
    alignment: int,
    collective_id: int,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Shaped[Array, "R _"], ...]:
    """[rows, _] of each array: what each of P peers has for this device, anything elsewhere. Within `shard_map`.

    out: where the rows to each peer begin, how many they are, and where they begin there; back: the same of those from
    each peer. devices: the peers' places along `axis`, this device's among them. Where rows begin, `rows` and S are
    multiples of `alignment`, which is one of each array's `row_alignment`; as whole multiples are copied, up to
    alignment - 1 rows more than were asked for, there must be room for them at both ends. collective_id: one of its own
    for exchanges among these groups of devices, which all make them in the same order.

    interpret: InterpretParams to run as TPUs would, on any platform, slowly. Raises ValueError for rows that are no
    multiple of `alignment`, or an alignment too small for an array.
    """
    for a in arrays:
        if alignment % row_alignment(a.dtype):
            raise ValueError(f"alignment={alignment}: rows of {a.dtype} need a multiple of {row_alignment(a.dtype)}")
        if rows % alignment or a.shape[0] % alignment:
            raise ValueError(f"rows={a.shape[0]} to rows={rows}: expected multiples of alignment={alignment}")
    n_peers = devices.shape[0]
    me = jnp.argmax(devices == lax.axis_index(axis))
    order = (me + 1 + jnp.arange(n_peers)) % n_peers  # the next device first, itself last
    (at, size, there), (back_at, back_size, back_there) = out, back
    size, back_size = (-(-a // alignment) * alignment for a in (size, back_size))
    scalars = devices, at, size, there, back_at, back_size, back_there
    in_place = pl.BlockSpec(memory_space=pl.ANY)
    return tuple(
        pl.pallas_call(
            functools.partial(_kernel, axis=axis, alignment=alignment),
            out_shape=[jax.ShapeDtypeStruct((rows, a.shape[1]), a.dtype) for a in arrays],
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=(),
                in_specs=[in_place] * len(arrays),
                out_specs=[in_place] * len(arrays),
                scratch_shapes=[pltpu.SemaphoreType.DMA, pltpu.SemaphoreType.DMA],
            ),
            compiler_params=pltpu.CompilerParams(collective_id=collective_id, has_side_effects=True),
            interpret=interpret,
            name="exchange",
        )(*(a[order].astype(jnp.int32) for a in scalars), *arrays)
    )


def _kernel(device, at, size, there, back_at, back_size, back_there, *refs, axis, alignment):
    n_peers, n = device.shape[0], len(refs) // 2 - 1
    sources, targets, (sent, arrived) = refs[:n], refs[n : 2 * n], refs[2 * n :]

    # A peer's result has its place in memory only while the peer is in here. One that is ahead may signal for the next
    # exchange while another still waits in this one, and is counted here. No harm: when the first goes on from the k-th
    # nobody has signalled more than k times, so everyone has k times, and is in here.
    barrier = pltpu.get_barrier_semaphore()
    pl.loop(0, n_peers)(lambda p: pl.semaphore_signal(barrier, 1, device_id={axis: device[p]}))
    pl.semaphore_wait(barrier, n_peers)

    def each_copy(do, begin, sizes, end):
        @pl.loop(0, n_peers)
        def _(p):
            @pl.when(sizes[p] > 0)
            def _():
                size = pl.multiple_of(sizes[p], alignment)
                read, written = (pl.ds(pl.multiple_of(a[p], alignment), size) for a in (begin, end))
                for source, target in zip(sources, targets):
                    place = source.at[read], target.at[written]
                    do(pltpu.make_async_remote_copy(*place, sent, arrived, device_id={axis: device[p]}))

    each_copy(lambda copy: copy.start(), at, size, there)
    each_copy(lambda copy: copy.wait_send(), at, size, there)
    each_copy(lambda copy: copy.wait_recv(), back_there, back_size, back_at)
