"""AdamW as published: betas, decoupled decay of matrices, clipping by the global norm (reference section 7.2)."""

import jax
import optax
from jaxtyping import Array, Float

from dsjax.config import OptimizerConfig
from dsjax.precision import weight_name


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Gradient to direction of descent; the step multiplies it by the learning rate."""
    return optax.chain(
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
    )


def decayed(model):
    """Which weights decay: all but the norms' scales."""
    return jax.tree_util.tree_map_with_path(lambda path, _: weight_name(path).split("/")[-1] != "scale", model)


def clip(grads, norm: Float[Array, ""], limit: float):
    """Gradients scaled down to a global norm of `limit` where theirs is above it."""
    factor = jax.numpy.minimum(1.0, limit / (norm + 1e-12))
    return jax.tree.map(lambda g: g * factor, grads)
