"""softmax(q k^T) v under a causal and document mask: `blocks` of queries with a gradient of its own, which runs
everywhere, JAX's `splash` kernels for TPUs and NVIDIA's `cudnn`, in which no score leaves the chip's own memory.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pallas_kernels.choice import choose, warn_once
from pallas_kernels.latent_attention import masked_softmax
from pallas_kernels.scaled_linear import Scaling, scaled_linears
from sharding.rules import constrain, spec, whole

IMPLEMENTATIONS = "blocks", "splash", "splash_interpret", "cudnn"
IMPLEMENTATION_BY_PLATFORM = {"cpu": "blocks", "tpu": "splash", "gpu": "cudnn"}

_MIN_BLOCK, _MAX_BLOCKS = 128, 8
_CHUNK = 512  # rows of a block whose scores are held at a time
_LANES = 128  # splash takes rows by whole lanes
_CUDNN_LONGEST = 8192  # tokens; which pairs see each other takes 2 T^2 bytes a sequence there


def attend(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    segment_ids: Int[Array, "B T"],
    scale: float,
    implementation: str = "auto",
) -> Float[Array, "B T H V"]:
    """Attention of every token to those before it in its own segment; softmax in float32.

    Where the sequence is sharded over `context`, keys and values travel. The backward pass computes the scores again,
    and no pass holds those of more than 512 rows. For jax.checkpoint the output is named "attn_out".

    implementation: "auto" (by platform), "blocks", "splash", "splash_interpret" (the kernels on a CPU, for tests) or
    "cudnn". The kernels leave to blocks what they cannot do: a sequence that is sharded over `context`, or that 128
    does not divide; for cuDNN one of more than 8,192 tokens, or float32. Where JAX finds no cuDNN that can, or a GPU
    older than Hopper, blocks are used with a line in the log. Any other name raises ValueError.
    """
    heads = spec("batch", "seq", "heads", None)

    def local(q, k, v, *places):
        return _attend_locally(q, whole(k, "context", 1), whole(v, "context", 1), places, scale, implementation)

    return _sharded(local, q, segment_ids, (k, v), (heads, heads))


def attend_latent(
    q: Float[Array, "B T H K"],
    c_kv: Float[Array, "B T C"],
    k_rope: Float[Array, "B T R"],
    wkv_b: Float[Array, "C H N_V"],
    segment_ids: Int[Array, "B T"],
    scale: float,
    implementation: str = "auto",
    scaling: Scaling | None = None,
) -> Float[Array, "B T H V"]:
    """The same from latents: a head's key is the first K - R of c_kv wkv_b and k_rope, its value the rest.

    What crosses `context`, forward, and backward as gradients, is the latents: C + R numbers a token. scaling: how the
    product with wkv_b is quantised.
    """
    nope = q.shape[-1] - k_rope.shape[-1]

    def local(q, c_kv, k_rope, wkv_b, *places):
        c_kv, k_rope, wkv_b = whole(c_kv, "context", 1), whole(k_rope, "context", 1), whole(wkv_b, "fsdp")
        rows, matrix = c_kv.reshape(-1, c_kv.shape[-1]), wkv_b.reshape(wkv_b.shape[0], -1)
        kv = rows @ matrix if scaling is None else scaled_linears(rows, (matrix,), scaling)[0]
        kv = kv.reshape(*c_kv.shape[:2], *wkv_b.shape[1:])
        k_nope, v = jnp.split(kv, [nope], axis=-1)
        shared = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:-1], k_rope.shape[-1]))
        k = jnp.concatenate([k_nope, shared], axis=-1)
        return _attend_locally(q, k, v, places, scale, implementation)

    latent = spec("batch", "seq", None)
    return _sharded(local, q, segment_ids, (c_kv, k_rope, wkv_b), (latent, latent, spec("rank", "heads", None)))


def attend_past(
    q: Float[Array, "B T H K"],
    c_kv: Float[Array, "B S C"],
    k_rope: Float[Array, "B S R"],
    wkv_b: Float[Array, "C H N_V"],
    length: Int[Array, "B"],
    scale: float,
) -> Float[Array, "B T H V"]:
    """Attention of new tokens to a row's cached latents, their own among them: token t sees the first
    length[b] + t + 1. All scores of these tokens exist at once; no gradient is meant."""
    nope = q.shape[-1] - k_rope.shape[-1]

    def local(q, c_kv, k_rope, wkv_b, length):
        wkv_b = whole(wkv_b, "fsdp")
        kv = jnp.einsum("bsc,chn->bshn", c_kv, wkv_b)
        scores = jnp.einsum("bthn,bshn->bhts", q[..., :nope], kv[..., :nope], preferred_element_type=jnp.float32)
        scores += jnp.einsum("bthr,bsr->bhts", q[..., nope:], k_rope, preferred_element_type=jnp.float32)
        p = masked_softmax(scores * scale, length)
        return jnp.einsum("bhts,bshv->bthv", p.astype(q.dtype), kv[..., nope:])

    heads, row = spec("batch", None, "heads", None), spec("batch", None, None)
    in_specs = (heads, row, row, spec("rank", "heads", None), spec("batch"))
    y = jax.shard_map(local, in_specs=in_specs, out_specs=heads, check_vma=False)(
        jax.reshard(q, heads), c_kv, k_rope, wkv_b, length
    )
    return constrain(y, "batch", "seq", "heads", None)


def _sharded(local, q, segment_ids, arrays, specs):
    """local(q, *arrays, index, segments of queries, segments of keys) on each device's part."""
    heads, seq = spec("batch", "seq", "heads", None), spec("batch", "seq")
    index = constrain(jnp.arange(q.shape[1]), "seq")
    segments = constrain(segment_ids, "batch", "seq"), constrain(segment_ids, "batch", None)
    return jax.shard_map(
        local, in_specs=(heads, *specs, spec("seq"), seq, spec("batch", None)), out_specs=heads, check_vma=False
    )(q, *arrays, index, *segments)


def _attend_locally(q, k, v, places, scale, implementation):
    """places: index of each query; segments of queries; of keys."""
    implementation = choose(implementation, IMPLEMENTATION_BY_PLATFORM, IMPLEMENTATIONS)
    by_kernel = q.shape[1] == k.shape[1] and k.shape[1] % _LANES == 0
    if implementation == "cudnn" and by_kernel and q.dtype == jnp.bfloat16 and k.shape[1] <= _CUDNN_LONGEST:
        try:
            return checkpoint_name(_library(q, k, v, places[2], scale, "cudnn"), "attn_out")
        except (NotImplementedError, RuntimeError) as error:  # found as JAX traces: version and GPU
            warn_once(f"attention in blocks, not by cuDNN: {str(error).splitlines()[0]}")
    q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))  # [B, H, T, .]: one copy here, none in the blocks
    if implementation.startswith("splash") and by_kernel:
        return _splash(q, k, v, places[2], scale, implementation == "splash_interpret").swapaxes(1, 2)
    return checkpoint_name(_attend(q, k, v, places, scale).swapaxes(1, 2), "attn_out")


def _splash(q, k, v, segment_ids, scale, interpret):
    """By Pallas kernels for TPUs: of the blocks of scores, those above the diagonal are not visited."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        BlockSizes,
        CausalMask,
        MultiHeadMask,
        SegmentIds,
        make_splash_mha_single_device,
    )

    heads, t = q.shape[1:3]
    rows = next(size for size in (512, 256, _LANES) if t % size == 0)
    sizes = BlockSizes(*(rows,) * 8)
    kernel = make_splash_mha_single_device(
        MultiHeadMask([CausalMask((t, t))] * heads),
        block_sizes=sizes,
        residual_checkpoint_name="attn_out",
        interpret=interpret,
    )
    q = (q * scale).astype(q.dtype)
    return jax.vmap(lambda q, k, v, ids: kernel(q, k, v, segment_ids=SegmentIds(ids, ids)))(q, k, v, segment_ids)


def _library(q, k, v, segment_ids, scale, name):
    """By jax.nn, whose keys and values have one width: values get zeros. The documents are a mask that all heads share,
    [B, 1, T, T], as JAX offers cuDNN no other one that leaves their number open."""
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    wide = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, k.shape[-1] - v.shape[-1])))
    y = jax.nn.dot_product_attention(q, k, wide, mask=same, scale=scale, is_causal=True, implementation=name)
    return y[..., : v.shape[-1]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, places, scale):
    return _attend_forward(q, k, v, places, scale)[0]


def _attend_forward(q, k, v, places, scale):
    out = []
    for rows, seen in _blocks(q.shape[2], k.shape[2]):
        keys, values = k[:, :, seen], v[:, :, seen]

        def part(_, of_rows, keys=keys, values=values, seen=seen):
            q, *of_rows = of_rows
            p = _probabilities(q, keys, *of_rows, places[2][:, seen], scale)
            return None, jnp.einsum("bhts,bhsv->bhtv", p.astype(v.dtype), values)

        out.append(_in_chunks(part, None, (q[:, :, rows], places[0][rows], places[1][:, rows]))[1])
    return jnp.concatenate(out, axis=2), (q, k, v, places)


def _attend_backward(scale, residuals, dy):
    q, k, v, places = residuals
    dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for rows, seen in _blocks(q.shape[2], k.shape[2]):
        keys, values = k[:, :, seen], v[:, :, seen]

        def part(sums, of_rows, keys=keys, values=values, seen=seen):
            q, *of_rows, dy = of_rows
            p = _probabilities(q, keys, *of_rows, places[2][:, seen], scale)
            dp = jnp.einsum("bhtv,bhsv->bhts", dy, values, preferred_element_type=jnp.float32)
            ds = (p * (dp - jnp.sum(p * dp, axis=-1, keepdims=True)) * scale).astype(q.dtype)
            dk = sums[0].at[:, :, seen].add(jnp.einsum("bhts,bhtk->bhsk", ds, q))
            dv = sums[1].at[:, :, seen].add(jnp.einsum("bhts,bhtv->bhsv", p.astype(q.dtype), dy))
            return (dk, dv), jnp.einsum("bhts,bhsk->bhtk", ds, keys)

        of_rows = q[:, :, rows], places[0][rows], places[1][:, rows], dy[:, :, rows]
        (dk, dv), dq_block = _in_chunks(part, (dk, dv), of_rows)
        dq.append(dq_block)
    return jnp.concatenate(dq, axis=2), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)


def _blocks(t: int, s: int):
    """Slices of queries, and of the keys that they may see: the causal half, where the sequence is not sharded."""
    size = max(_MIN_BLOCK, -(-t // _MAX_BLOCKS))
    size = size if size <= _CHUNK else -(-size // _CHUNK) * _CHUNK
    for start in range(0, t, size):
        stop = min(start + size, t)
        whole = start + (stop - start) // _CHUNK * _CHUNK  # what is left after it is a block of its own
        for rows in (slice(start, whole), slice(whole, stop)):
            if rows.start < rows.stop:
                yield rows, slice(0, rows.stop if t == s else s)


def _in_chunks(part, sums, of_rows):
    """part(sums, of_rows) -> sums, [B, H, T, .], for _CHUNK rows after another where a block has more.

    of_rows: arrays [B, H, T, .], [T] and [B, T].
    """
    t = of_rows[0].shape[2]
    if t <= _CHUNK:
        return part(sums, of_rows)
    axes = [{1: 0, 2: 1, 4: 2}[a.ndim] for a in of_rows]
    chunks = tuple(
        jnp.moveaxis(a.reshape(*a.shape[:i], -1, _CHUNK, *a.shape[i + 1 :]), i, 0) for a, i in zip(of_rows, axes)
    )
    sums, out = lax.scan(part, sums, chunks)
    out = jnp.moveaxis(out, 0, 2)
    return sums, out.reshape(*out.shape[:2], t, out.shape[-1])


def _probabilities(q, k, index, q_segments, k_segments, scale: float):
    """Of the rows at `index`; the keys are the first."""
    scores = jnp.einsum("bhtk,bhsk->bhts", q, k, preferred_element_type=jnp.float32) * scale
    causal = index[:, None] >= lax.iota(jnp.int32, k.shape[2])
    same = q_segments[:, :, None] == k_segments[:, None]
    return jax.nn.softmax(jnp.where((causal & same)[:, None], scores, -jnp.inf), axis=-1)
