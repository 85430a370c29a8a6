"""What a dimension is, and which mesh axes it is spread over: the one table that maps the former to the latter."""

import jax
import jax.numpy as jnp
from jax import P, lax

RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp", "expert"),  # rows of activations
    "seq": "context",  # tokens of a row
    "embed": ("fsdp", "expert"),  # hidden width of a weight
    "width": "fsdp",  # the same of a routed expert, whose experts are spread over `expert`
    "heads": "tensor",
    "latent": None,  # MLA's compressed widths
    "rank": "fsdp",  # the same, where a weight starts from them
    "experts": "expert",
    "ff": "tensor",
    "vocab": "tensor",
    "layers": None,
}
TOKEN_AXES = ("data", "fsdp", "expert", "context")  # those that tokens are spread over


def spec(*names: str | None) -> P:
    """Mesh axes of an array whose dimensions have these names, None for a dimension kept whole.

    Raises KeyError on an unknown name.
    """
    return P(*(name and RULES[name] for name in names))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x` laid out as the names say: the communication, if any, is in sight."""
    return jax.reshard(x, spec(*names))


def as_rows(x: jax.Array) -> jax.Array:
    """[B, T, H, *F] as [B * T, H * F]: each device lines up the tokens that it has, nothing is sent."""
    batch, seq, *features = jax.typeof(x).sharding.spec

    def local(x):
        return x.reshape(x.shape[0] * x.shape[1], -1)

    return jax.shard_map(local, in_specs=P(batch, seq, *features), out_specs=P(_together(batch, seq), features[0]))(x)


def as_tokens(rows: jax.Array, like: jax.Array, *features: int) -> jax.Array:
    """`as_rows` undone: rows as [B, T, *features], with the tokens where those of `like` [B, T, ...] are."""
    layout = jax.typeof(like).sharding
    (batch, seq), (b, t) = layout.spec[:2], layout.shard_shape(like.shape)[:2]
    over = jax.typeof(rows).sharding.spec

    def local(rows):
        return rows.reshape(b, t, -1, *features[1:])

    return jax.shard_map(local, in_specs=over, out_specs=P(batch, seq, over[1]))(rows)


def whole(x: jax.Array, axis_name: str | tuple[str, ...], axis: int = 0) -> jax.Array:
    """Inside `shard_map`: the devices' parts of a dimension put together. Its gradient is summed and scattered."""
    return lax.all_gather(x, axis_name, axis=axis, tiled=True) if lax.axis_size(axis_name) > 1 else x


def halves(tree) -> tuple:
    """Two trees of arrays, with the first and the second half of each device's own rows [B, ...]; nothing is sent."""

    def local(tree):
        leaves, kind = jax.tree.flatten(tree)
        return tuple(map(kind.unflatten, zip(*(jnp.split(a, 2) for a in leaves))))

    specs = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, tree)
    return jax.shard_map(local, in_specs=(specs,), out_specs=(specs, specs))(tree)


def join(first: jax.Array, second: jax.Array) -> jax.Array:
    """`halves` undone."""
    layout = jax.typeof(first).sharding.spec
    return jax.shard_map(lambda *both: jnp.concatenate(both), in_specs=(layout, layout), out_specs=layout)(
        first, second
    )


def _together(*axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return tuple(name for a in axes if a for name in ((a,) if isinstance(a, str) else a))


def shard_shape(shape: tuple[int, ...], names: tuple[str | None, ...], mesh) -> tuple[int, ...]:
    """Shape of one device's part of an array. Raises ValueError where a dimension does not divide."""
    return jax.NamedSharding(mesh, spec(*names)).shard_shape(shape)
