"""Attention on a latent cache for Hopper GPUs, in Pallas for Mosaic GPU (JAX 0.11 and later).

A block of threads takes 64 queries of a row, which are all heads' and all new tokens', through the row's entries or a
part of them, 64 at a time. One warpgroup copies entries to shared memory, where both products read them. Two multiply:
each has the scores of half the entries and half the columns of the output, so that the sums of 64 queries fit the
registers of two warpgroups. Between the products they exchange largest scores and softmax through shared memory. Parts
of a row, which a small batch is cut into so that every multiprocessor has work, are put together in plain JAX.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul_gpu import copied_ahead, launch, multiprocessors, too_old, transforms

QUERIES = ENTRIES = 64  # of a block
_HALF = ENTRIES // 2
_CHUNK = 64  # columns that are made zeros at a time
_DEPTH = 128  # columns of a step of the scores
_WIDTHS = ((128, 256, 384, 512), 64)  # of c_kv and k_rope: what the tensor core and shared memory have room for
_LEAST = -1e30  # in place of a largest score where there is none; -inf less itself would be NaN
_PART = 5  # blocks of entries as large as a part's queries, and its result in float32, written and read again


def pallas_gpu(
    q_latent: Float[Array, "B T H C"],
    q_rope: Float[Array, "B T H R"],
    c_kv: Float[Array, "B S C"],
    k_rope: Float[Array, "B S R"],
    length: Int[Array, "B"],
    scale: float,
    *,
    splits: int | None = None,
    interpret=False,
) -> Float[Array, "B T H C"]:
    """As `latent_attention`, whose definition holds; bfloat16, C a multiple of 128 up to 512, R = 64.

    splits: parts that a row's entries are cut into, chosen if not given. interpret: InterpretGPUParams to run on any
    platform, slowly. Raises ValueError for what the kernel cannot do.
    """
    if reason := unsupported(q_latent, q_rope, c_kv, k_rope):
        raise ValueError(f"pallas_gpu: {reason}")
    return attend(q_latent, q_rope, c_kv, k_rope, None, c_kv.shape[1], length, scale, splits, interpret)


def attend(q_latent, q_rope, c_kv, k_rope, firsts, s: int, length, scale: float, splits: int | None, interpret):
    """As `pallas_gpu`, of at most s entries a row.

    With firsts [B, N] int32 entries lie in pages of s / N: c_kv [n, C] and k_rope [n, R] have those of all pages, and
    firsts says of each page of a row how many times 64 entries lie before it.
    """
    (b, t, h, c), rows = q_latent.shape, q_latent.shape[1] * q_latent.shape[2]
    tiles = -(-rows // QUERIES)
    splits = splits or choose_splits(b * tiles, -(-s // ENTRIES), multiprocessors(interpret))

    def queries(q):
        return jnp.pad(q.reshape(b, rows, -1), [(0, 0), (0, -rows % QUERIES), (0, 0)])

    token = jnp.minimum(jnp.arange(tiles * QUERIES, dtype=jnp.int32) // h, t - 1)
    stops = jnp.minimum(length.astype(jnp.int32)[:, None] + 1 + token, s)  # of the entries that each query sees
    blocks = -(-stops[:, -1:] // ENTRIES)
    edges = blocks * jnp.arange(splits + 1, dtype=jnp.int32) // splits
    cache = (c_kv, k_rope) if firsts is None else (c_kv, k_rope, firsts)
    out, log_total = _parts(queries(q_latent), queries(q_rope), cache, s, stops, edges, scale, interpret)
    if splits > 1:
        out = jnp.einsum("bkq,bkqc->bqc", jax.nn.softmax(log_total, axis=1), out)
    return out.reshape(b, -1, c)[:, :rows].reshape(b, t, h, c).astype(q_latent.dtype)


def unsupported(
    q_latent: Float[Array, "B T H C"],
    q_rope: Float[Array, "B T H R"],
    c_kv: Float[Array, "... C"],
    k_rope: Float[Array, "... R"],
) -> str | None:
    """Why the kernel cannot attend with these, in words; None if it can."""
    if reason := too_old():
        return reason
    if dtypes := [str(a.dtype) for a in (q_latent, q_rope, c_kv, k_rope) if a.dtype != jnp.bfloat16]:
        return f"attends in bfloat16, not {dtypes[0]}"
    (c, r), (widths, rope) = (c_kv.shape[-1], k_rope.shape[-1]), _WIDTHS
    if c not in widths or r != rope:
        return f"C={c} must be one of {widths} and R={r} must be {rope}"
    return None


def choose_splits(items: int, blocks: int, n_multiprocessors: int) -> int:
    """Parts to cut rows into: the fewest with which the last multiprocessor is done soonest, at `blocks` blocks a row.

    items: blocks of threads if rows are not cut.
    """

    def time(splits):
        return -(-items * splits // n_multiprocessors) * (-(-blocks // splits) + _PART)

    return min(range(1, blocks + 1), key=time)


def _parts(q_latent, q_rope, cache, s: int, stops, edges, scale: float, interpret):
    """Of each part of each row: the output [B, parts, queries, C] of its entries alone, and the logarithm
    [B, parts, queries] of the sum of exp(score) over them. It has the blocks edges[row, part] to edges[row, part + 1].
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    (b, n_queries, c), r, dtype = q_latent.shape, q_rope.shape[2], q_latent.dtype
    splits, tiles, columns = edges.shape[1] - 1, n_queries // QUERIES, c // 2
    tiling, layout = transforms(dtype), plgpu.Layout.WGMMA

    def constant(value, *shape):
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout if shape[1:] else layout.reduce(1))

    def by_query(ref):
        return plgpu.load(ref, layout=layout.reduce(1), optimized=False)

    def spread(values, n):
        return lax.broadcast_in_dim(values, (QUERIES, n), (0,))

    def index(axis, n):
        return plgpu.broadcasted_iota(jnp.int32, (ENTRIES, n), axis, layout=layout)

    def kernel(stops, edges, q_latent, q_rope, c_kv, k_rope, *rest):
        *firsts, out, log_total = rest
        block, half = lax.axis_index("sm"), lax.axis_index("warpgroup")
        tile, part, row = block % tiles, block // tiles % splits, block // (tiles * splits)  # tiles share entries: L2
        queries, mine, my_columns = pl.ds(tile * QUERIES, QUERIES), pl.ds(half * _HALF, _HALF), half * columns
        first, written = edges[row, part], stops[row, n_queries - 1]

        @functools.partial(
            pl.run_scoped,
            q=plgpu.SMEM((QUERIES, c), dtype, transforms=tiling),
            q_rotated=plgpu.SMEM((QUERIES, r), dtype, transforms=tiling),
            softmax=plgpu.SMEM((QUERIES, ENTRIES), dtype, transforms=transforms(dtype, 64)),  # in tiles of half a block
            exchanged=plgpu.SMEM((2, QUERIES), jnp.float32),
            copied=plgpu.Barrier(num_arrivals=2),
            there=plgpu.Barrier(num_arrivals=2, num_barriers=2),
            collective_axes="warpgroup",
        )
        def _(q, q_rotated, softmax, exchanged, copied, there):
            def meet(i):
                plgpu.barrier_arrive(there.at[i])
                plgpu.barrier_wait(there.at[i])

            def of_other(values):
                exchanged[half] = values
                meet(0)
                return by_query(exchanged.at[1 - half])

            def context(run):
                @pl.when(half == 0)
                def _():
                    plgpu.copy_gmem_to_smem(q_latent.at[row, queries], q, copied)
                    plgpu.copy_gmem_to_smem(q_rope.at[row, queries], q_rotated, copied)

                plgpu.barrier_wait(copied)
                begin = constant(0, QUERIES, columns), constant(_LEAST, QUERIES), constant(0, QUERIES)
                weighted, largest, total = run(begin)
                total = jnp.maximum(total + of_other(total), 1)  # at least 1, but for a part without entries
                y, place = weighted / spread(total, columns), pl.ds(my_columns, columns)
                if splits > 1:
                    out[row, part, queries, place] = y
                else:
                    q[:, place] = y.astype(dtype)  # both warpgroups are done with what was there
                    plgpu.commit_smem()
                    meet(1)

                @pl.when(half == 0)
                def _():
                    log_total[row, part, queries] = largest * math.log(2) + jnp.log(total)
                    if splits == 1:
                        plgpu.copy_smem_to_gmem(q, out.at[row, part, queries])
                        plgpu.wait_smem_to_gmem(0)

            def body(step, entries, rotated, carry):
                weighted, largest, total = carry
                start = (first + step[0]) * ENTRIES

                def multiply(product):
                    @pl.loop(0, c // _DEPTH)  # unrolled, the addresses of all of q would take the registers
                    def _(i):
                        depth = pl.ds(i * _DEPTH, _DEPTH)
                        plgpu.wgmma(product, q.at[:, depth], entries.at[mine, depth].T)

                    plgpu.wgmma(product, q_rotated, rotated.at[mine].T)
                    return product[...]

                scores = pl.run_scoped(multiply, plgpu.ACC((QUERIES, _HALF), jnp.float32))
                stop = by_query(stops.at[row, queries]) - (start + half * _HALF)
                scores = jnp.where(
                    index(1, _HALF) < spread(stop, _HALF), scores * (scale * math.log2(math.e)), -jnp.inf
                )
                new = jnp.maximum(largest, jnp.max(scores, axis=1))
                new = jnp.maximum(new, of_other(new))
                p, correction = jnp.exp2(scores - spread(new, _HALF)), jnp.exp2(largest - new)

                @pl.when(start + ENTRIES > written)
                def _():  # what is not written may be NaN, and no 0 of the softmax helps there
                    @pl.loop(0, columns // _CHUNK)
                    def _(i):
                        values = entries.at[:, pl.ds(my_columns + i * _CHUNK, _CHUNK)]
                        kept = index(0, _CHUNK) < written - start
                        values[...] = jnp.where(kept, values[...], jnp.zeros((), dtype))

                    plgpu.commit_smem()

                softmax[:, mine] = p.astype(dtype)
                meet(1)
                weighted = weighted * spread(correction, columns)
                values = entries.at[:, pl.ds(my_columns, columns)]
                weighted = _add_product(plgpu, weighted, softmax, values, interpret)
                return weighted, new, total * correction + jnp.sum(p, axis=1)

            def place(i):
                if not firsts:
                    return first + i, 0
                of_page = s // ENTRIES // firsts[0].shape[1]
                return firsts[0][row, (first + i) // of_page] + (first + i) % of_page, 0

            def block_of(width):
                return plgpu.BlockSpec((ENTRIES, width), place, transforms=tiling)

            n_blocks = edges[row, part + 1] - first
            pipeline = copied_ahead(plgpu, body, context, n_blocks, block_of(c), block_of(r), stages=2)
            pipeline(*((c_kv, k_rope) if firsts else (c_kv.at[row], k_rope.at[row])))

    out_type = (
        jax.ShapeDtypeStruct((b, splits, n_queries, c), dtype if splits == 1 else jnp.float32),
        jax.ShapeDtypeStruct((b, splits, n_queries), jnp.float32),
    )
    # Nothing is summed across warps; what is kept for that would not fit beside two blocks of entries.
    run = launch(plgpu, kernel, out_type, interpret, blocks=b * splits * tiles, reduction_scratch_bytes=0)
    return run(stops, edges, q_latent, q_rope, *cache)


def _add_product(plgpu, total, a, b, interpret):
    """total + a @ b of two arrays in shared memory, added up by the tensor core."""
    if interpret:  # which knows no sum that begins with values, nor an operand in registers

        def product(accumulator):
            plgpu.wgmma(accumulator, a, b)
            return accumulator[...]

        return total + pl.run_scoped(product, plgpu.ACC(total.shape, total.dtype))

    values = a[...]  # from registers, as a and b are not swizzled alike
    return pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, values, b))(plgpu.ACC.init(total))
