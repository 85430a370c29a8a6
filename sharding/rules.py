"""What a dimension is, and which mesh axes it is spread over: the one table that maps the former to the latter."""

import jax
from jax import P

RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp", "expert"),  # rows of activations
    "seq": "context",  # tokens of a row
    "embed": "fsdp",  # hidden width of a weight
    "heads": "tensor",
    "latent": None,  # MLA's compressed widths
    "experts": "expert",
    "ff": "tensor",
    "vocab": "tensor",
    "layers": None,
}


def spec(*names: str | None) -> P:
    """Mesh axes of an array whose dimensions have these names, None for a dimension kept whole.

    Raises KeyError on an unknown name.
    """
    return P(*(name and RULES[name] for name in names))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x` laid out as the names say: the communication, if any, is in sight."""
    return jax.reshard(x, spec(*names))


def shard_shape(shape: tuple[int, ...], names: tuple[str | None, ...], mesh) -> tuple[int, ...]:
    """Shape of one device's part of an array. Raises ValueError where a dimension does not divide."""
    return jax.NamedSharding(mesh, spec(*names)).shard_shape(shape)
