"""Muon: the momentum of each matrix, made orthogonal by Newton-Schulz, at an update size that fits AdamW's settings.

Follows Moonlight (arXiv:2502.16982, section 2.2): the update's RMS is 0.2, whatever the matrix's shape. As in its code
(github.com/MoonshotAI/Moonlight, examples/toy_train.py), every matrix but embedding and head is Muon's, the router's
included, and a linear layer is one matrix, all its heads together.
"""

import math

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float

from dsjax.precision import weight_name

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic, github.com/KellerJordan/Muon
ITERATIONS = 5
RMS = 0.2
_STACKS = "dense", "moe", "mtp_input", "mtp_block"


def orthogonalise() -> optax.GradientTransformation:
    """Each leaf's matrices made orthogonal, times 0.2 sqrt(the longer side). Leaves have a model's names."""

    def update(updates, state, params=None):
        return jax.tree_util.tree_map_with_path(lambda path, g: _of_leaf(weight_name(path), g), updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def is_matrix(name: str) -> bool:
    """Whether the weight of this name is Muon's."""
    return name.split("/")[0] in _STACKS and name.split("/")[-1] != "scale"


def newton_schulz(g: Float[Array, "*N A B"]) -> Float[Array, "*N A B"]:
    """Near U V^T of each matrix's U S V^T: singular values between about 0.7 and 1.2. Zeros stay zeros."""
    a, b, c = COEFFICIENTS
    wide = g.shape[-2] <= g.shape[-1]
    x = g if wide else jnp.swapaxes(g, -1, -2)
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)

    def step(x, _):
        y = jnp.einsum("...ij,...kj->...ik", x, x)
        return a * x + (b * y + c * y @ y) @ x, None

    x, _ = lax.scan(step, x, length=ITERATIONS)
    return x if wide else jnp.swapaxes(x, -1, -2)


def _of_leaf(name: str, g: Float[Array, "L *W"]) -> Float[Array, "L *W"]:
    n = 2 if "experts" in name.split("/") else 1  # axes that count matrices: layers, experts
    inputs = g.ndim - 1 - n if name.split("/")[-1] == "wo" else 1  # axes after them that the product sums over

    def matrices(g):
        a, b = math.prod(g.shape[n : n + inputs]), math.prod(g.shape[n + inputs :])
        return (RMS * math.sqrt(max(a, b)) * newton_schulz(g.reshape(*g.shape[:n], a, b))).reshape(g.shape)

    return _with_whole(matrices, g, n)


def _with_whole(function, g: Float[Array, "L *W"], n: int) -> Float[Array, "L *W"]:
    """function(g), where it sees whole matrices, which the n first axes count, and each device some of them.

    Devices that hold parts of all matrices exchange them for whole ones of a few experts, where these divide, or of a
    few layers, which zeros fill up; devices that hold the same share the layers, if there are enough.
    """
    layout = jax.typeof(g).sharding
    cut = [(axis, _axes(names, layout.mesh)) for axis, names in enumerate(layout.spec)]
    used = [name for _, names in cut for name in names]
    sizes, counts, parts = layout.mesh.shape, list(layout.shard_shape(g.shape)[:n]), 1  # parts: of the layers
    exchanges, shares = [], []
    for axis, names in cut[n:]:
        size = math.prod(sizes[name] for name in names)
        if size > 1 and n == 2 and counts[1] % size == 0:
            counts[1] //= size
            exchanges.append((names, 1, axis))
        elif size > 1:
            parts *= size
            exchanges.append((names, 0, axis))
    for name in sizes:
        if name not in used and sizes[name] > 1 and parts * sizes[name] <= counts[0]:
            parts *= sizes[name]
            shares.append(name)
    layers = -(-counts[0] // parts) * parts

    def local(g):
        n_layers = g.shape[0]
        g = jnp.pad(g, ((0, layers - n_layers), *((0, 0),) * (g.ndim - 1)))
        for names, split, axis in exchanges:
            g = lax.all_to_all(g, names, split, axis, tiled=True)
        for name in shares:
            g = lax.dynamic_slice_in_dim(g, *_share(g.shape[0], name))
        g = function(g)
        for name in reversed(shares):
            g = lax.all_gather(g, name, tiled=True)
        for names, split, axis in reversed(exchanges):
            g = lax.all_to_all(g, names, axis, split, tiled=True)
        return g[:n_layers]

    return jax.shard_map(local, in_specs=layout.spec, out_specs=layout.spec, check_vma=False)(g)


def _share(n: int, name: str):
    """(start, size) of this device's part of n along a mesh axis that divides it."""
    size = n // lax.axis_size(name)
    return lax.axis_index(name) * size, size


def _axes(names, mesh) -> tuple[str, ...]:
    """The mesh axes of more than one device that a dimension is cut along."""
    names = () if names is None else (names,) if isinstance(names, str) else names
    return tuple(name for name in names if mesh.shape[name] > 1)
