"""Attention on a latent cache in pages, each read where it lies.

`paged_attention` is the public function, `reference` its definition: the pages of a row put one behind the other, for
`latent_attention`. `pallas_tpu` and `pallas_gpu` (in latent_attention_gpu.py) are its kernels with another way to the
entries: pages are copied to the chip one by one, by the row's page table, and nothing is put together in HBM. On a TPU
the copies of a block of pages run while the block before it is attended to, also from one row to the next.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels import latent_attention, latent_attention_gpu
from pallas_kernels.choice import choose, warn_once
from pallas_kernels.grouped_matmul_tpu import VMEM_BYTES, parameters
from pallas_kernels.latent_attention import IMPLEMENTATION_BY_PLATFORM, LANES, Sums

_TABLE_BYTES = 512 << 10  # of the scalar memory, which has 1 MiB


def paged_attention(
    q_latent: Float[Array, "B T H C"],
    q_rope: Float[Array, "B T H R"],
    c_kv: Float[Array, "L P S C"],
    k_rope: Float[Array, "L P S R"],
    table: Int[Array, "B N"],
    length: Int[Array, "B"],
    layer: Int[Array, ""],
    scale: float,
    implementation: str = "auto",
) -> Float[Array, "B T H C"]:
    """`latent_attention` of each row on the pages of one layer that `table` names, in order; S entries a page.

    New token t of row b sees the first length[b] + t + 1 entries of its pages, itself last. Several rows may have the
    same page, and a row that has fewer than N any page number behind its own. Entries that no token sees may hold
    anything finite; only the kernels, which do not use them, also take NaN there.

    implementation: as of `latent_attention`. "pallas_tpu" reads pages of 128, 256, 512 or 1024 entries in place,
    "pallas_gpu" those of multiples of 64, "pallas_interpret" any. What they cannot read in place is put together first
    and goes to the kernel of `latent_attention`, with a line in the log.
    """
    name = choose(implementation, IMPLEMENTATION_BY_PLATFORM, IMPLEMENTATIONS)
    if name in _UNSUPPORTED and (reason := _UNSUPPORTED[name](q_latent, q_rope, c_kv, k_rope, table)):
        warn_once(f"attention on the latent cache from a copy of its pages, not in place: {reason}")
        past = gather(c_kv, table, layer), gather(k_rope, table, layer)
        return latent_attention.latent_attention(q_latent, q_rope, *past, length, scale, name)
    return IMPLEMENTATIONS[name](q_latent, q_rope, c_kv, k_rope, table, length, layer, scale)


def reference(
    q_latent: Float[Array, "B T H C"],
    q_rope: Float[Array, "B T H R"],
    c_kv: Float[Array, "L P S C"],
    k_rope: Float[Array, "L P S R"],
    table: Int[Array, "B N"],
    length: Int[Array, "B"],
    layer: Int[Array, ""],
    scale: float,
) -> Float[Array, "B T H C"]:
    """The definition."""
    past = gather(c_kv, table, layer), gather(k_rope, table, layer)
    return latent_attention.reference(q_latent, q_rope, *past, length, scale)


def gather(
    pages: Shaped[Array, "L P S *F"], table: Int[Array, "B N"], layer: Int[Array, ""]
) -> Shaped[Array, "B _ *F"]:
    """What a layer's pages hold of each row, in order."""
    got = pages[layer, table]
    return got.reshape(got.shape[0], -1, *got.shape[3:])


def write(
    pages: Shaped[Array, "L P S *F"],
    new: Shaped[Array, "B T *F"],
    table: Int[Array, "B N"],
    length: Int[Array, "B"],
    layer: Int[Array, ""],
    whole: bool | None = None,
) -> Shaped[Array, "L P S *F"]:
    """`pages` with a layer's new entries of each row behind its first `length`; of one that has no page, on page 0.

    whole: pages that new entries come to are read, and written whole; if not given, where `_lies_by_entry`. Page 0 may
    lose what it had then.
    """
    size, n_new, new = pages.shape[2], new.shape[1], new.astype(pages.dtype)

    def page_of(nth):
        page = jnp.take_along_axis(table, jnp.minimum(nth, table.shape[1] - 1), axis=1)
        return jnp.where(nth < table.shape[1], page, 0)

    if not (_lies_by_entry(pages) if whole is None else whole):
        at = length[:, None] + jnp.arange(n_new)
        return pages.at[layer, page_of(at // size), at % size].set(new)
    nth = length[:, None] // size + jnp.arange(1 + -(-(n_new - 1) // size))
    page, token = page_of(nth), nth[:, :, None] * size + jnp.arange(size) - length[:, None, None]
    came = new[jnp.arange(len(new))[:, None, None], jnp.clip(token, 0, n_new - 1)]
    is_new = ((token >= 0) & (token < n_new)).reshape(*token.shape, *(1,) * (new.ndim - 2))
    return pages.at[layer, page].set(jnp.where(is_new, came, pages[layer, page]))


def _lies_by_entry(pages: Shaped[Array, "L P S *F"]) -> bool:
    """Whether pages lie in memory as [L, P, F, S]: a TPU's, where F is less than its lanes.

    A new entry is a column of its page then, and XLA would copy all pages to where it is a row, and back. Also where
    "auto" is "pallas_interpret", for tests.
    """
    name = IMPLEMENTATION_BY_PLATFORM[jax.default_backend()]
    narrow = pages.ndim == 4 and pages.shape[3] < LANES and pages.shape[2] % LANES == 0
    return name == "pallas_interpret" or (name == "pallas_tpu" and narrow)


def unsupported_tpu(
    q_latent: Float[Array, "B T H C"],
    q_rope: Float[Array, "B T H R"],
    c_kv: Float[Array, "L P S C"],
    k_rope: Float[Array, "L P S R"],
    table: Int[Array, "B N"],
) -> str | None:
    """Why the kernel for TPUs cannot read these pages in place, in words; None if it can."""
    (page, c), r = c_kv.shape[2:], k_rope.shape[3]
    if page not in (sizes := (128, 256, 512, 1024)):
        return f"page_size={page} must be one of {sizes}"
    if c % LANES or r >= LANES:  # other pages do not lie in memory as the kernel reads them
        return f"C={c} must be a multiple of {LANES} and R={r} less"
    if 4 * table.size > _TABLE_BYTES:
        return f"a table of {table.shape[0]} x {table.shape[1]} pages exceeds {_TABLE_BYTES >> 10} KiB"
    if choose_part(*q_latent.shape[1:], r, page, c_kv.dtype.itemsize) is None:
        return f"{q_latent.shape[2]} queries of width {c} + {r} and a page of {page} do not fit {VMEM_BYTES >> 20} MiB"
    return None


def pallas_tpu(
    q_latent: Float[Array, "B T H C"],
    q_rope: Float[Array, "B T H R"],
    c_kv: Float[Array, "L P S C"],
    k_rope: Float[Array, "L P S R"],
    table: Int[Array, "B N"],
    length: Int[Array, "B"],
    layer: Int[Array, ""],
    scale: float,
    *,
    part: tuple[int, int] | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "B T H C"]:
    """As `paged_attention`, whose definition holds. part: new tokens of a row and pages at a time, chosen if not given.

    interpret: True to run as plain JAX, on any platform; InterpretParams to run as a TPU would, slowly.
    """
    (b, t, h, c), (page, r), n = q_latent.shape, k_rope.shape[2:], table.shape[1]
    tokens, pages = part or choose_part(t, h, c, r, page, c_kv.dtype.itemsize)
    pages = min(pages, n)
    items, rows, block = b * t // tokens, tokens * h, pages * page  # an item: `tokens` tokens of a row
    cores = 2 - items % 2  # each begins its first copies itself; one core does the work of two one after the other

    def queries(core, i, *_):
        return core * (items // cores) + i, 0, 0

    in_place = pl.BlockSpec(memory_space=pl.ANY)
    out = pl.pallas_call(
        functools.partial(_kernel, n_pages=n, n_heads=h, n_items=t // tokens, scale=scale),
        out_shape=jax.ShapeDtypeStruct((items, rows, c), q_latent.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(cores, items // cores),
            in_specs=[
                pl.BlockSpec((pl.squeezed, rows, c), queries),
                pl.BlockSpec((pl.squeezed, rows, r), queries),
                in_place,
                in_place,
            ],
            out_specs=pl.BlockSpec((pl.squeezed, rows, c), queries),
            scratch_shapes=[
                *latent_attention.scratch(rows, c),
                pltpu.VMEM((2, block, c), c_kv.dtype),
                pltpu.VMEM((2, r, block), k_rope.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SMEM((1,), jnp.int32),
            ],
        ),
        compiler_params=dataclasses.replace(parameters("parallel", "arbitrary"), disable_bounds_checks=True),
        cost_estimate=pl.CostEstimate(
            flops=2 * items * rows * n * page * (2 * c + r),
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in (q_latent, q_latent, q_rope))
            + items * n * page * (c + r) * c_kv.dtype.itemsize,
            transcendentals=items * rows * n * page,
        ),
        interpret=interpret,
        name="paged_attention",
    )(
        length.astype(jnp.int32),
        table.astype(jnp.int32).reshape(-1),  # of two axes the last would fill whole lanes
        layer.astype(jnp.int32).reshape(1),
        q_latent.reshape(items, rows, c),
        q_rope.reshape(items, rows, r),
        c_kv,
        jnp.swapaxes(k_rope, 2, 3),  # as it lies in memory: XLA puts entries on the lanes where R is less than these
    )
    return out.reshape(b, t, h, c)


def choose_part(t: int, h: int, c: int, r: int, page: int, itemsize: int) -> tuple[int, int] | None:
    """New tokens of a row and pages that are attended to at a time: the most, of tokens first, that fit VMEM; None if
    one token and one page do not."""
    for tokens in (n for n in range(t, 0, -1) if t % n == 0):
        block = latent_attention.largest_block(tokens * h, c, r, itemsize)
        if block is not None and block >= page:
            return tokens, block // page
    return None


def _kernel(
    length, table, layer, q_latent, q_rope, c_pages, k_pages, out, largest, total, weighted, c_kv, k_rope, copied, turn,
    *, n_pages, n_heads, n_items, scale,
):  # fmt: skip
    """All entries of one row, a block of pages after the other, for the queries of some of its new tokens.

    c_kv [2, block, C] and k_rope [2, R, block] have the block at hand and the next one, which `turn` tells apart.
    """
    i, n_mine, page, block = pl.program_id(1), pl.num_programs(1), c_pages.shape[2], c_kv.shape[1]
    pages = block // page
    item = pl.program_id(0) * n_mine + i
    n_tokens, sums = q_latent.shape[0] // n_heads, Sums(largest, total, weighted)

    def extent(item):  # of the entries that the first new token sees, and the last one
        before = length[lax.div(item, n_items)] + lax.rem(item, n_items) * n_tokens
        return jnp.minimum(before + 1, n_pages * page), jnp.minimum(before + n_tokens, n_pages * page)

    def fetched(item, j):  # pages of the block
        return jnp.minimum(lax.div(extent(item)[1] - 1, page) + 1 - j * pages, pages)

    def copies(item, j, slot, n, do, unroll=False):  # of the first n pages
        @pl.loop(0, n, unroll=unroll)
        def _(k):
            at = layer[0], table[lax.div(item, n_items) * n_pages + j * pages + k]
            place = pl.ds(pl.multiple_of(k * page, page), page)
            do(pltpu.make_async_copy(c_pages.at[at], c_kv.at[slot, place], copied.at[slot]))
            do(pltpu.make_async_copy(k_pages.at[at], k_rope.at[slot, :, place], copied.at[slot]))

    def start(item, j, slot):
        n, do = fetched(item, j), lambda copy: copy.start()
        pl.when(n == pages)(lambda: copies(item, j, slot, pages, do, unroll=True))
        pl.when(n < pages)(lambda: copies(item, j, slot, n, do))

    def wait(item, j, slot):
        n = fetched(item, j)
        pl.when(n < pages)(lambda: copies(item, j, slot, n, lambda copy: copy.wait()))

        @pl.when(n == pages)
        def _():  # for the bytes of all of them at once
            for buffer in (c_kv.at[slot], k_rope.at[slot]):
                pltpu.make_async_copy(buffer, buffer, copied.at[slot]).wait()

    @pl.when(i == 0)
    def _():
        turn[0] = 0
        start(item, 0, 0)

    latent_attention.clear(sums)
    first, stop = extent(item)
    n_blocks = lax.div(stop - 1, block) + 1

    @pl.loop(0, n_blocks)
    def _(j):
        slot, last = turn[0], j == n_blocks - 1

        @pl.when(~last | (i < n_mine - 1))
        def _():
            start(jnp.where(last, item + 1, item), jnp.where(last, 0, j + 1), 1 - slot)

        wait(item, j, slot)
        entries = c_kv.at[slot], k_rope.at[slot]
        latent_attention.add_block(sums, q_latent, q_rope, *entries, j * block, first, stop, n_heads, scale)
        turn[0] = 1 - slot

    latent_attention.write(sums, out)


def unsupported_gpu(
    q_latent: Float[Array, "B T H C"],
    q_rope: Float[Array, "B T H R"],
    c_kv: Float[Array, "L P S C"],
    k_rope: Float[Array, "L P S R"],
    table: Int[Array, "B N"],
) -> str | None:
    """Why the kernel for Hopper GPUs cannot read these pages in place, in words; None if it can."""
    if reason := latent_attention_gpu.unsupported(q_latent, q_rope, c_kv, k_rope):
        return reason
    if c_kv.shape[2] % latent_attention_gpu.ENTRIES:
        return f"page_size={c_kv.shape[2]} must be a multiple of {latent_attention_gpu.ENTRIES}"
    return None


def pallas_gpu(
    q_latent: Float[Array, "B T H C"],
    q_rope: Float[Array, "B T H R"],
    c_kv: Float[Array, "L P S C"],
    k_rope: Float[Array, "L P S R"],
    table: Int[Array, "B N"],
    length: Int[Array, "B"],
    layer: Int[Array, ""],
    scale: float,
    *,
    splits: int | None = None,
    interpret=False,
) -> Float[Array, "B T H C"]:
    """As `paged_attention`, whose definition holds; what it takes and means is as of latent_attention_gpu's."""
    if reason := unsupported_gpu(q_latent, q_rope, c_kv, k_rope, table):
        raise ValueError(f"pallas_gpu: {reason}")
    n_pages, page = c_kv.shape[1:3]
    firsts = (layer * n_pages + table).astype(jnp.int32) * (page // latent_attention_gpu.ENTRIES)
    entries = (a.reshape(-1, a.shape[3]) for a in (c_kv, k_rope))
    how = table.shape[1] * page, length, scale, splits, interpret
    return latent_attention_gpu.attend(q_latent, q_rope, *entries, firsts, *how)


IMPLEMENTATIONS: dict[str, Callable] = {
    "reference": reference,
    "pallas_tpu": pallas_tpu,
    "pallas_interpret": functools.partial(pallas_tpu, interpret=True),
    "pallas_gpu": pallas_gpu,
}
_UNSUPPORTED = {"pallas_tpu": unsupported_tpu, "pallas_gpu": unsupported_gpu}
