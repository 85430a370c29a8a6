"""Tokens to the devices that own their experts, and back. Called inside `jax.shard_map`; arrays are one device's part.

Every device of an `expert` group gathers the group's tokens, keeps the pairs (token, expert) whose expert it owns, and
the results are summed back to the tokens' owners. Nothing is dropped, whatever the load.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int


class Plan(NamedTuple):
    """Order of the (token, choice) pairs by local expert; pairs of other devices' experts come last."""

    order: jax.Array  # [M] int32, pair at each sorted row
    inverse: jax.Array  # [M] int32, sorted row of each pair
    group_sizes: jax.Array  # [E_local] int32


def dispatch(
    x: Float[Array, "N D"], indices: Int[Array, "N K"], weights: Float[Array, "N K"], n_local_experts: int
) -> tuple[Float[Array, "M D"], Float[Array, "M"], Plan]:
    """Rows sorted by local expert, each row's weight, and the plan to bring results back (M = tokens of group * K)."""
    if lax.axis_size("expert") > 1:
        gathered = (lax.all_gather(a, "expert", tiled=True) for a in (x, indices, weights))
        x, indices, weights = (checkpoint_name(a, "dispatched") for a in gathered)  # not to be sent again
    local = indices.reshape(-1) - lax.axis_index("expert") * n_local_experts
    local = jnp.where((local >= 0) & (local < n_local_experts), local, n_local_experts)
    order = jnp.argsort(local, stable=True).astype(jnp.int32)
    inverse = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=jnp.int32), unique_indices=True)
    group_sizes = jnp.sum(local[:, None] == jnp.arange(n_local_experts), axis=0, dtype=jnp.int32)
    plan = Plan(order, inverse, group_sizes)
    return _spread(x, plan, indices.shape[1]), _permute(weights.reshape(-1), order, inverse), plan


def combine(y: Float[Array, "M D"], plan: Plan, num_experts_per_tok: int) -> Float[Array, "N D"]:
    """Sum of each token's rows, at the token's owner. Rows are already weighted."""
    y = _collect(y, plan, num_experts_per_tok)
    return lax.psum(lax.psum_scatter(y, "expert", tiled=True), "tensor")


# A gather's gradient would be a scatter-add, row after row; as rows are permuted, it is a gather by the inverse.
@jax.custom_vjp
def _permute(x, order, inverse):
    return x[order]


_permute.defvjp(lambda x, order, inverse: (x[order], inverse), lambda inverse, dy: (dy[inverse], None, None))


def _spread_fwd(x, plan, k):
    return x[plan.order // k], plan


def _spread_bwd(k, plan, dy):
    return _sum_choices(dy, plan, k), None


def _collect_fwd(y, plan, k):
    return _sum_choices(y, plan, k), plan


def _collect_bwd(k, plan, dz):
    return dz[plan.order // k], None


def _sum_choices(y, plan, k):
    return jnp.sum(y[plan.inverse].reshape(-1, k, y.shape[1]), axis=1)


_spread = jax.custom_vjp(lambda x, plan, k: _spread_fwd(x, plan, k)[0], nondiff_argnums=(2,))
_spread.defvjp(_spread_fwd, _spread_bwd)
_collect = jax.custom_vjp(lambda y, plan, k: _collect_fwd(y, plan, k)[0], nondiff_argnums=(2,))
_collect.defvjp(_collect_fwd, _collect_bwd)
