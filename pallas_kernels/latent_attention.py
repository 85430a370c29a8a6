"""Attention on a latent cache, in MLA's absorbed form: all heads read the same keys, and part of them as values.

`latent_attention` is the public function, `reference` its definition, `pallas_tpu` the kernel of TPUs and `pallas_gpu`
(in latent_attention_gpu.py) that of Hopper GPUs. Both read the cache once: block after block of a row's entries goes
through scores, softmax and output while it is on the chip, and maximum, sum and output so far are corrected where a
later block changes them. Blocks past a row's length are not fetched.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels import latent_attention_gpu
from pallas_kernels.choice import choose, warn_once
from pallas_kernels.grouped_matmul_tpu import USED, VMEM_BYTES, parameters, product
from pallas_kernels.latent_attention_gpu import pallas_gpu

IMPLEMENTATION_BY_PLATFORM = {"cpu": "reference", "tpu": "pallas_tpu", "gpu": "pallas_gpu"}

LANES = 128
_OVER_ROWS, _OVER_COLUMNS = ((((1,), (axis,)), ((), ())) for axis in (0, 1))  # of the second operand
_MAX_BLOCK = 1024  # entries; twice as many save a tenth of the instructions, and leave more of the last block unused


def latent_attention(
    q_latent: Float[Array, "B T H C"],
    q_rope: Float[Array, "B T H R"],
    c_kv: Float[Array, "B S C"],
    k_rope: Float[Array, "B S R"],
    length: Int[Array, "B"],
    scale: float,
    implementation: str = "auto",
) -> Float[Array, "B T H C"]:
    """softmax(scale (q_latent c_kv^T + q_rope k_rope^T)) c_kv over what each new token sees, in the dtype of q_latent.

    New token t of row b sees the first length[b] + t + 1 entries of its cache, itself last; softmax in float32. All
    arrays but length have one dtype. Entries that no token sees may hold anything finite; only the kernels, which do
    not use them, also take NaN there. For inference: the kernels have no gradient. Follows DeepSeek-V2
    (arXiv:2405.04434), appendix C.

    implementation: "auto" (by platform), "reference", "pallas_tpu", "pallas_interpret" (the same kernel on any
    platform, for tests) or "pallas_gpu"; any other name raises ValueError. What "pallas_gpu" cannot do goes to
    "reference", with a line in the log.
    """
    name = choose(implementation, IMPLEMENTATION_BY_PLATFORM, IMPLEMENTATIONS)
    if name == "pallas_gpu" and (reason := latent_attention_gpu.unsupported(q_latent, q_rope, c_kv, k_rope)):
        warn_once(f"attention on the latent cache by its definition, not by the kernel for GPUs: {reason}")
        name = "reference"
    return IMPLEMENTATIONS[name](q_latent, q_rope, c_kv, k_rope, length, scale)


def reference(
    q_latent: Float[Array, "B T H C"],
    q_rope: Float[Array, "B T H R"],
    c_kv: Float[Array, "B S C"],
    k_rope: Float[Array, "B S R"],
    length: Int[Array, "B"],
    scale: float,
) -> Float[Array, "B T H C"]:
    """The definition: the cache is read for each of the three products, and all scores exist at once."""
    scores = jnp.einsum("bthc,bsc->bhts", q_latent, c_kv, preferred_element_type=jnp.float32)
    scores += jnp.einsum("bthr,bsr->bhts", q_rope, k_rope, preferred_element_type=jnp.float32)
    p = masked_softmax(scores * scale, length)
    b, t, h, c = q_latent.shape
    # The cache as the second operand, as it lies: as the first, which einsum makes it, XLA:CPU copies it turned.
    out = jnp.matmul(p.astype(q_latent.dtype).reshape(b, h * t, -1), c_kv)
    return jnp.swapaxes(out.reshape(b, h, t, c), 1, 2)


def masked_softmax(scores: Float[Array, "B H T S"], length: Int[Array, "B"]) -> Float[Array, "B H T S"]:
    """Softmax over what is written: new token t sees the first length + t + 1 entries."""
    t, s = scores.shape[2:]
    seen = jnp.arange(s) <= (length[:, None] + jnp.arange(t))[:, :, None]
    return jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)


def pallas_tpu(
    q_latent: Float[Array, "B T H C"],
    q_rope: Float[Array, "B T H R"],
    c_kv: Float[Array, "B S C"],
    k_rope: Float[Array, "B S R"],
    length: Int[Array, "B"],
    scale: float,
    *,
    block: int | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "B T H C"]:
    """As `latent_attention`, whose definition holds. block: entries of the cache at a time, chosen if not given.

    interpret: True to run as plain JAX, on any platform; InterpretParams to run as a TPU would, slowly. Raises
    ValueError if the queries of a row do not fit the chip's memory.
    """
    (b, t, h, c), (s, r), rows = q_latent.shape, k_rope.shape[1:], q_latent.shape[1] * q_latent.shape[2]
    block = block or choose_block(rows, s, c, r, c_kv.dtype.itemsize)
    stop = jnp.minimum(length.astype(jnp.int32) + t, s)  # of the entries that some new token sees

    def queries(b, j, length):
        return b, 0, 0

    def fetched(b, j, length):  # the last block again, where a row has no more: a block that is there is not fetched
        return jnp.minimum(j, lax.div(jnp.minimum(length[b] + t, s) - 1, block))

    out = pl.pallas_call(
        functools.partial(_kernel, n_entries=s, n_heads=h, n_tokens=t, scale=scale),
        out_shape=jax.ShapeDtypeStruct((b, rows, c), q_latent.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, lax.div(jnp.max(stop) - 1, block) + 1),
            in_specs=[
                pl.BlockSpec((pl.squeezed, rows, c), queries),
                pl.BlockSpec((pl.squeezed, rows, r), queries),
                pl.BlockSpec((pl.squeezed, block, c), lambda b, j, length: (b, fetched(b, j, length), 0)),
                pl.BlockSpec((pl.squeezed, r, block), lambda b, j, length: (b, 0, fetched(b, j, length))),
            ],
            out_specs=pl.BlockSpec((pl.squeezed, rows, c), queries),
            scratch_shapes=scratch(rows, c),
        ),
        compiler_params=parameters("parallel", "arbitrary"),
        cost_estimate=pl.CostEstimate(
            flops=2 * b * rows * s * (2 * c + r),
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in (q_latent, q_latent, q_rope, c_kv, k_rope)),
            transcendentals=b * rows * s,
        ),
        interpret=interpret,
        name="latent_attention",
    )(
        length.astype(jnp.int32),
        q_latent.reshape(b, rows, c),
        q_rope.reshape(b, rows, r),
        c_kv,
        jnp.swapaxes(k_rope, 1, 2),  # as it lies in memory: XLA puts entries on the lanes where R is less than these
    )
    return out.reshape(b, t, h, c)


def choose_block(rows: int, s: int, c: int, r: int, itemsize: int) -> int:
    """Entries of the cache in a block: the most, of 1024 and less, that fit VMEM with `rows` queries, but at most s."""
    block = largest_block(rows, c, r, itemsize)
    if block is None:
        raise ValueError(
            f"latent attention: {rows} queries of width {c} + {r} do not fit {VMEM_BYTES >> 20} MiB of VMEM"
        )
    return min(block, s)


def largest_block(rows: int, c: int, r: int, itemsize: int) -> int | None:
    """Entries of the cache, 1024 or less, that fit VMEM with `rows` queries; None if not even 128 do."""

    def bytes_needed(block):
        twice = block * (_whole_lanes(c) + r) + rows * (2 * _whole_lanes(c) + _whole_lanes(r))
        return 2 * itemsize * twice + 4 * rows * (2 * LANES + _whole_lanes(c) + 3 * block)

    return next((n for n in (_MAX_BLOCK, 512, 256, LANES) if bytes_needed(n) <= USED * VMEM_BYTES), None)


def _whole_lanes(n: int) -> int:
    return -(-n // LANES) * LANES


def _kernel(
    length, q_latent, q_rope, c_kv, k_rope, out, largest, total, weighted, *, n_entries, n_heads, n_tokens, scale
):
    """One block [block, C] and [R, block] of one row's entries, for its queries [T H, C] and [T H, R]."""
    row, j = pl.program_id(0), pl.program_id(1)
    sums, start = Sums(largest, total, weighted), j * c_kv.shape[0]
    pl.when(j == 0)(lambda: clear(sums))
    first = jnp.minimum(length[row] + 1, n_entries)
    stop = jnp.minimum(length[row] + n_tokens, n_entries)
    add_block(sums, q_latent, q_rope, c_kv, k_rope, start, first, stop, n_heads, scale)
    pl.when(j == pl.num_programs(1) - 1)(lambda: write(sums, out))


class Sums(NamedTuple):
    """Of the blocks so far, by query."""

    largest: jax.Array  # [T H, 128] float32 score, the same on all lanes
    total: jax.Array  # [T H, 128] float32 sum of exp(score - largest), the same on all lanes
    weighted: jax.Array  # [T H, C] float32 sum of exp(score - largest) times values


def scratch(rows: int, c: int) -> list:
    """Room for Sums."""
    return [pltpu.VMEM((rows, width), jnp.float32) for width in (LANES, LANES, c)]


def clear(sums: Sums) -> None:
    sums.largest[...] = jnp.full_like(sums.largest, -jnp.inf)
    sums.total[...] = jnp.zeros_like(sums.total)
    sums.weighted[...] = jnp.zeros_like(sums.weighted)


def write(sums: Sums, out) -> None:
    out[...] = (sums.weighted[...] / sums.total[:, :1]).astype(out.dtype)


def add_block(sums: Sums, q_latent, q_rope, c_kv, k_rope, start, first, stop, n_heads, scale) -> None:
    """Adds the entries [block, C] and [R, block] from `start` on, of which the first new token sees those before
    `first`, each further one one more, but nobody sees those from `stop` on."""
    largest, total, weighted = sums
    rows, block = q_latent.shape[0], c_kv.shape[0]

    def add(scores, values):
        new = jnp.maximum(largest[...], jnp.max(scores, axis=1, keepdims=True))  # finite: everyone sees entry 0
        p, correction = jnp.exp(scores - new[:, :1]), jnp.exp(largest[...] - new)
        largest[...] = new
        total[...] = correction * total[...] + jnp.sum(p, axis=1, keepdims=True)
        weighted[...] = correction[:, :1] * weighted[...] + product(p.astype(values.dtype), values, _OVER_ROWS)

    def scores():
        return scale * (
            product(q_latent[...], c_kv[...], _OVER_COLUMNS) + product(q_rope[...], k_rope[...], _OVER_ROWS)
        )

    seen_by_all = start + block <= first
    pl.when(seen_by_all)(lambda: add(scores(), c_kv[...]))

    @pl.when(~seen_by_all & (start < stop))
    def _():
        token = lax.div(lax.broadcasted_iota(jnp.int32, (rows, 1), 0), n_heads)
        seen = jnp.minimum(first + token, stop) - start
        entry = lax.broadcasted_iota(jnp.int32, (rows, block), 1)
        written = lax.broadcasted_iota(jnp.int32, (block, 1), 0) < stop - start
        # What is not written may be NaN, and so may what a block has beyond the end of the cache: no 0 helps there.
        values = jnp.where(written, c_kv[...], jnp.zeros((), c_kv.dtype))
        add(jnp.where(entry < seen, scores(), -jnp.inf), values)


IMPLEMENTATIONS: dict[str, Callable] = {
    "reference": reference,
    "pallas_tpu": pallas_tpu,
    "pallas_interpret": functools.partial(pallas_tpu, interpret=True),
    "pallas_gpu": pallas_gpu,
}
