"""Which numbers are kept and multiplied in which format: the only place that knows.

A recipe is data: for each class of matmuls how its three products are quantised, if they are. A new one is a new entry
of RECIPES and its name in `dsjax.config`.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import P, lax

from dsjax.config import ComputeConfig
from pallas_kernels.quantise import Quantised, Tile, quantise
from pallas_kernels.scaled_linear import Product, Scaling


@dataclass(frozen=True)
class Recipe:
    """The format of every class of matmuls (reference section 5.1).

    Norms, softmax, scores, losses, master weights and their gradients' sums are float32 in all.
    """

    dtype: str  # of activations, and of operands that are not quantised
    attention: Scaling | None = None  # wq, wq_a, wq_b, wkv_a, wkv_b; wk and wv of plain attention
    attention_out: Scaling | None = None  # wo
    mlp: Scaling | None = None  # of dense layers
    experts: Scaling | None = None  # routed
    shared: Scaling | None = None  # shared experts
    eh_proj: Scaling | None = None  # of multi-token prediction
    head: str | None = None  # dtype of its product, in which the loss is; None: as activations
    router: str = "float32"  # dtype of its product

    def alignment(self) -> int:
        """What the rows of an expert are padded to a multiple of, so that no tile holds those of two."""
        return (self.experts and self.experts.weight_gradient.left.rows) or 1


def _quantised(scaling: Scaling) -> Recipe:
    # What attention gives is kept for its own backward pass as it is; wo quantises it from there. The paper keeps it in
    # E5M6 instead: less exact, and a second copy.
    out = replace(scaling, kept=None)
    return Recipe("bfloat16", scaling, out, mlp=scaling, experts=scaling, shared=scaling)


def _tiled(size: int | None, block: int | None, ue8m0: bool = False) -> Scaling:
    """Tiles of one row or column and `size` values along what is summed over; of weights, `block` columns share it."""
    row, column = Tile(1, size, ue8m0), Tile(size, 1, ue8m0)
    return Scaling(
        forward=Product(row, Tile(size, block, ue8m0)),
        input_gradient=Product(row, Tile(block, size, ue8m0)),
        weight_gradient=Product(column, column),
        kept=row,
    )


_WHOLE, _BLOCK, _ROW, _COLUMN = Tile(None, None), Tile(128, 128), Tile(1, 128), Tile(128, 1)

RECIPES: dict[str, Recipe] = {
    "float32": Recipe("float32"),
    "bf16": Recipe("bfloat16"),
    # 1x128 tiles of activations and of their gradients, 128x1 where tokens are summed over, 128x128 blocks of weights
    "fp8_deepseek": _quantised(_tiled(128, 128)),
    "fp8_deepseek_ue8m0": _quantised(_tiled(128, 128, ue8m0=True)),
    # blocks of 512, a column of weights by itself: what pays on chips that scale in their vector unit
    "fp8_rowwise": _quantised(_tiled(512, 1)),
    # Controls of `dsjax claims fp8`: one scale a matrix, and gradients in blocks, with which the paper's model diverged
    "fp8_tensor": _quantised(
        Scaling(Product(_WHOLE, _WHOLE), Product(_WHOLE, _WHOLE), Product(_WHOLE, _WHOLE), kept=_WHOLE)
    ),
    "fp8_block_gradients": _quantised(
        Scaling(Product(_ROW, _BLOCK), Product(_BLOCK, _BLOCK), Product(_COLUMN, _BLOCK), kept=_ROW)
    ),
}


def recipe_of(compute: ComputeConfig) -> Recipe:
    """The recipe that a configuration names, with the implementation of the products that it names."""
    recipe = RECIPES[compute.precision]
    scalings = {name: value for name, value in vars(recipe).items() if isinstance(value, Scaling)}
    return replace(recipe, **{k: replace(v, implementation=compute.scaled_matmul) for k, v in scalings.items()})


def weight_name(path) -> str:
    """A leaf's name without Flax's inner keys: "moe/attn/wo"."""
    keys = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    return "/".join(key for key in keys if key not in ("value", "raw_value"))


def cast_weights(model, precision: str):
    """The model with its matrices in the compute format; master weights stay float32 where they are kept.

    The gradient of the cast returns to float32.
    """
    recipe = RECIPES[precision]
    own = {"router": recipe.router, "head": recipe.head or recipe.dtype, "scale": "float32"}  # scale: of a norm

    def cast(path, w):
        if isinstance(w, Quantised):
            return w
        dtype = next((own[part] for part in weight_name(path).split("/") if part in own), recipe.dtype)
        return w.astype(jnp.dtype(dtype))

    return jax.tree_util.tree_map_with_path(cast, model, is_leaf=is_quantised)


def is_quantised(w: Any) -> bool:
    return isinstance(w, Quantised)


def in_fp8(model) -> bool:
    """Whether weights of the model are kept in FP8."""
    return any(map(is_quantised, jax.tree.leaves(model, is_leaf=is_quantised)))


def quantise_weights(model, precision: str):
    """The model with the matrices that the recipe multiplies in FP8 kept so, each device's part by itself.

    What `scaled_linears` would make of them at every use, so not to be trained. wkv_b stays as it is, which decoding
    takes apart; so does a matrix that is put together from devices' parts of other than whole tiles.
    """
    recipe = RECIPES[precision]

    def keep(path, w: jax.Array):
        name = weight_name(path)
        scaling = _scaling_of(name, recipe)
        if scaling is None:
            return w
        tile, axes = scaling.forward.right, [*jax.typeof(w).sharding.spec]
        axes += [None] * (w.ndim - len(axes))
        stacked, split = matrix_axes(name)
        mesh, parts = jax.typeof(w).sharding.mesh, (slice(stacked, split), slice(split, None))
        for part, size in zip(parts, tile[:2]):
            names = [axis for a in axes[part] if a for axis in ((a,) if isinstance(a, str) else a) if axis != "tensor"]
            n_devices = math.prod(mesh.shape[axis] for axis in names)
            if n_devices > 1 and (size is None or math.prod(w.shape[part]) // n_devices % size):
                return w

        def local(w):
            def layer(w):
                matrix = w.reshape(*w.shape[: stacked - 1], math.prod(w.shape[stacked - 1 : split - 1]), -1)
                q = quantise(matrix, tile)
                return q.values.reshape(w.shape), q.scales

            return Quantised(*lax.map(layer, w), tile)

        scales = P(*axes[:stacked], axes[stacked], axes[split])
        out = Quantised(P(*axes), scales, tile)
        return jax.shard_map(local, in_specs=P(*axes), out_specs=out, check_vma=False)(w)

    return jax.tree_util.tree_map_with_path(keep, model)


def matrix_axes(name: str) -> tuple[int, int]:
    """Of a matrix in the blocks: how many dimensions count layers and experts, and where those of its rows end."""
    stacked = 2 if "/experts/" in name else 1
    return stacked, stacked + (2 if name.endswith("/wo") else 1)


def _scaling_of(name: str, recipe: Recipe) -> Scaling | None:
    """How a weight's products are quantised, if they are."""
    match name.split("/"):
        case [*_, "wq" | "wq_a" | "wq_b" | "wkv_a" | "wk" | "wv"]:
            return recipe.attention
        case [*_, "wo"]:
            return recipe.attention_out
        case [*_, "eh_proj"]:
            return recipe.eh_proj
        case [*_, "experts", _]:
            return recipe.experts
        case [*_, "shared", _]:
            return recipe.shared
        case [*_, "ffn", "w_gate" | "w_up" | "w_down"]:
            return recipe.mlp
    return None
