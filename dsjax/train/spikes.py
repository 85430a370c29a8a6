"""Loss spikes: what counts as one, measured inside the step against running medians, and the file that tells of it.

The medians' window is part of the training state, so that a run that was killed sees the spikes of one that was not.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dsjax.config import FaultsConfig

MIN_SEEN = 8  # steps before anything counts as a spike


def new_history(faults: FaultsConfig) -> Float[Array, "2 W"]:
    """Losses and gradient norms of the last spike_window steps, before the first: NaN."""
    return jnp.full((2, faults.spike_window), jnp.nan, jnp.float32)


def medians(history: Float[Array, "2 W"]) -> Float[Array, "2"]:
    """Of loss and gradient norm; NaN before MIN_SEEN steps."""
    seen = jnp.sum(jnp.isfinite(history), axis=1)
    return jnp.where(seen >= MIN_SEEN, jnp.nanmedian(history, axis=1), jnp.nan)


def is_spike(
    history: Float[Array, "2 W"], loss: Float[Array, ""], norm: Float[Array, ""], faults: FaultsConfig
) -> Bool[Array, ""]:
    """Whether loss or norm is above its median times spike_loss or spike_norm. NaN and Inf are none: they are skipped
    anyway."""
    limits = medians(history) * jnp.array([faults.spike_loss, faults.spike_norm])
    return jnp.any(jnp.stack([loss, norm]) > limits) & jnp.isfinite(loss) & jnp.isfinite(norm)


def remember(history: Float[Array, "2 W"], loss: Float[Array, ""], norm: Float[Array, ""]) -> Float[Array, "2 W"]:
    """The history with one more step; its oldest is forgotten."""
    return jnp.concatenate([history[:, 1:], jnp.stack([loss, norm])[:, None]], axis=1)


def leaf_norms(grads) -> Float[Array, "leaves"]:
    """The gradient norm of every weight, in the order of the tree's leaves."""
    return jnp.stack([jnp.sqrt(jnp.sum(jnp.square(g.astype(jnp.float32)))) for g in jax.tree.leaves(grads)])


def dump(run_folder: Path, step: int, facts: dict[str, Any]) -> Path:
    """spikes/step-N.json: what is known of a spike."""
    folder = run_folder / "spikes"
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:08}.json"
    path.write_text(json.dumps(facts, indent=1) + "\n")
    return path
