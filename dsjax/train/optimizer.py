"""The optimizers as published: AdamW (reference section 7.2) and Moonlight's Muon, with decoupled decay of matrices and
clipping by the global norm.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from dsjax.config import OptimizerConfig
from dsjax.precision import weight_name
from dsjax.train.muon import is_matrix, orthogonalise


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Gradient to direction of descent; the step multiplies it by the learning rate."""
    direction = stored_in(config.moments_dtype, optax.scale_by_adam(config.b1, config.b2, config.eps))
    if config.name == "muon":
        momentum = stored_in(config.moments_dtype, optax.trace(config.momentum, nesterov=True))
        direction = optax.partition({"muon": optax.chain(momentum, orthogonalise()), "adamw": direction}, _optimizers)
    return optax.chain(direction, optax.add_decayed_weights(config.weight_decay, mask=decayed))


def stored_in(dtype: str, transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same, computed in float32, with moments rounded to `dtype` between steps (reference section 5.1)."""

    def cast(state, dtype):
        return jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, state)

    def init(params):
        return cast(transform.init(params), dtype)

    def update(updates, state, params=None):
        updates, state = transform.update(updates, cast(state, "float32"), params)
        return updates, cast(state, dtype)

    return transform if dtype == "float32" else optax.GradientTransformation(init, update)


def decayed(model):
    """Which weights decay: all but the norms' scales."""
    return jax.tree_util.tree_map_with_path(lambda path, _: weight_name(path).split("/")[-1] != "scale", model)


def _optimizers(model):
    return jax.tree_util.tree_map_with_path(lambda path, _: "muon" if is_matrix(weight_name(path)) else "adamw", model)


def clip(grads, norm: Float[Array, ""], limit: float):
    """Gradients scaled down to a global norm of `limit` where theirs is above it."""
    factor = jnp.minimum(1.0, limit / (norm + 1e-12))
    return jax.tree.map(lambda g: g * factor, grads)
