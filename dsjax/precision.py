"""Which numbers are kept and multiplied in which format: the only place that knows."""

import jax
import jax.numpy as jnp

# float32 whatever the recipe: the router's choice and the norms (reference section 5.1)
_FLOAT32 = ("router", "scale")


def weight_name(path) -> str:
    """A leaf's name without Flax's inner keys: "moe/attn/wo"."""
    keys = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    return "/".join(key for key in keys if key not in ("value", "raw_value"))


def cast_weights(model, dtype: str):
    """The model with its matrices in the compute format; master weights stay float32 where they are kept.

    The gradient of the cast returns to float32.
    """
    if dtype == "float32":
        return model

    def cast(path, w: jax.Array) -> jax.Array:
        return w if any(part in _FLOAT32 for part in weight_name(path).split("/")) else w.astype(jnp.dtype(dtype))

    return jax.tree_util.tree_map_with_path(cast, model)
