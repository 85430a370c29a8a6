"""One optimizer step: state and batch in, new state and metrics out."""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from dsjax.config import Config
from dsjax.model.balance import max_violation, update_bias
from dsjax.model.transformer import DeepSeek, init_router_bias
from dsjax.precision import cast_weights
from dsjax.state import Batch, Metrics, RouterBias, TrainState
from dsjax.train.loss import Counts, LossParts, count, cross_entropy, next_targets, total_loss
from dsjax.train.optimizer import clip, make_optimizer
from dsjax.train.schedule import Knobs
from dsjax.train.spikes import is_spike, leaf_norms, medians, new_history, remember


def init_state(config: Config) -> TrainState:
    """The state before the first step, born sharded. Call it under `jax.jit` and `jax.set_mesh`."""
    return start_state(DeepSeek(config.model, rngs=nnx.Rngs(config.seed)), init_router_bias(config.model), config)


def start_state(model: DeepSeek, router_bias: RouterBias, config: Config) -> TrainState:
    """The state before the first step from given weights."""
    zero = jnp.zeros((), jnp.int32)
    here = config.optimizer.ema_decay is not None and config.optimizer.ema_on == "device"
    ema = jax.tree.map(jnp.copy, model) if here else None
    opt_state = make_optimizer(config.optimizer).init(model)
    return TrainState(zero, model, opt_state, router_bias, ema, zero, zero, new_history(config.faults))


def jit_init_state(config: Config):
    """A function that makes the first state. It runs once: on CPU it is compiled without optimisation, in a third of
    the time."""
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(functools.partial(init_state, config), compiler_options=options)


def train_step(
    state: TrainState, batch: Batch, knobs: dict[str, jax.Array], config: Config
) -> tuple[TrainState, Metrics]:
    """One update from a batch [A, B, T] of A micro-batches, of which the first knobs["micro_batches"] are taken; those
    after them must be padding (segment 0), as the losses' counts are those of all.

    A loss or gradient with NaN or Inf, and a spike if faults.on_spike is not `note`, leave everything as it was but the
    counts of skipped steps. Rows without room on
    their experts' devices leave everything as it was, step included, unless compute.on_overflow=drop; and so does a
    knobs["step"], where given, that is not the state's: a step that was sent after one to be taken again.
    """
    grads, parts = _gradients(state, batch, knobs, config)
    norm = optax.tree.norm(grads)
    taken = knobs.get("step", state.step) == state.step
    if config.compute.on_overflow == "redo":
        taken &= parts.overflow == 0
    good = (
        jnp.isfinite(norm)
        & jnp.isfinite(parts.loss)
        & jnp.isfinite(parts.balance)
        & jnp.all(jnp.isfinite(parts.mtp_loss))
    )
    spike = is_spike(state.history, parts.loss, norm, config.faults)
    if config.faults.on_spike != "note":
        good &= ~spike
    norms, medians_before = leaf_norms(grads), medians(state.history)

    new = updated(state, grads, norm, parts.load, knobs, config)
    new = new.replace(history=remember(state.history, parts.loss, norm))
    state = jax.tree.map(lambda n, o: jnp.where(good & taken, n, o), new, state).replace(
        step=state.step + taken,
        skipped=state.skipped + (taken & ~good),
        skipped_in_a_row=jnp.where(taken, jnp.where(good, 0, state.skipped_in_a_row + 1), state.skipped_in_a_row),
    )
    max_vio = jnp.concatenate([max_violation(parts.load.moe), max_violation(parts.load.mtp)])
    return state, Metrics(
        parts.loss,
        parts.mtp_loss,
        parts.balance,
        norm,
        parts.load,
        max_vio,
        parts.overflow,
        state.skipped,
        state.skipped_in_a_row,
        spike & taken,
        medians_before,
        norms,
    )


def updated(
    state: TrainState,
    grads: DeepSeek,
    norm: Float[Array, ""],
    load: RouterBias,
    knobs: dict[str, jax.Array],
    config: Config,
) -> TrainState:
    """The state with weights, their average and the optimizer's state a step further, by gradients of this global norm,
    and the router bias by the load of every expert."""
    grads = clip(grads, norm, config.optimizer.clip_norm)
    updates, opt_state = make_optimizer(config.optimizer).update(grads, state.opt_state, state.model)
    model = jax.tree.map(lambda w, u: w - knobs["learning_rate"] * u, state.model, updates)
    ema = state.ema
    if ema is not None:
        decay = config.optimizer.ema_decay
        ema = jax.tree.map(lambda a, w: decay * a + (1 - decay) * w, ema, model)
    bias = state.router_bias
    if config.model.topk_method == "noaux_tc":
        bias = jax.tree.map(lambda b, load: update_bias(b, load, knobs["bias_update_speed"]), bias, load)
    return state.replace(model=model, opt_state=opt_state, ema=ema, router_bias=bias)


def micro_gradients(
    model, router_bias: RouterBias, batch: Batch, mtp_weight: jax.Array, config: Config
) -> tuple[DeepSeek, LossParts]:
    """Gradient of the loss of a batch [1, B, T], and its parts."""
    counts = count(batch, config.model.num_nextn_predict_layers)
    return _share(model, router_bias, jax.tree.map(lambda a: a[0], batch), counts, mtp_weight, config)


def _share(model, router_bias, micro: Batch, counts: Counts, mtp_weight, config: Config) -> tuple[DeepSeek, LossParts]:
    """A micro-batch's share of the gradient, and of its parts."""

    def loss(model):
        model = cast_weights(model, config.compute.precision)
        return total_loss(model, micro, router_bias, counts, mtp_weight, config)

    return jax.grad(loss, has_aux=True)(model)


def _gradients(state: TrainState, batch: Batch, knobs: dict[str, jax.Array], config: Config):
    """Gradient of the whole batch's loss, and its parts, summed over micro-batches."""
    if batch.tokens.shape[0] == 1:
        return micro_gradients(state.model, state.router_bias, batch, knobs["mtp_weight"], config)
    counts = count(batch, config.model.num_nextn_predict_layers)
    # A loop of changing length: a batch ramp compiles once.
    scalar = jnp.zeros((), jnp.float32)
    no_parts = LossParts(
        scalar,
        jnp.zeros_like(counts.targets[1:]),
        scalar,
        jax.tree.map(jnp.zeros_like, state.router_bias),
        jnp.zeros((), jnp.int32),
    )
    zeros = jax.tree.map(jnp.zeros_like, state.model), no_parts

    def add(i, total):
        micro = jax.tree.map(lambda a: a[i], batch)
        more = _share(state.model, state.router_bias, micro, counts, knobs["mtp_weight"], config)
        return jax.tree.map(jnp.add, total, more)

    return jax.lax.fori_loop(0, knobs["micro_batches"], add, zeros)


def jit_train_step(config: Config):
    """`train_step` of this configuration, compiled at first use; the old state's memory is given up."""
    step = jax.jit(functools.partial(train_step, config=config), donate_argnums=0)

    def call(state: TrainState, batch: Batch, knobs: Knobs):
        return step(state, batch, {name: jnp.asarray(v) for name, v in vars(knobs).items()})

    return call


def heldout_nats(model: DeepSeek, batch: Batch, router_bias: RouterBias, config: Config) -> jax.Array:
    """[3] float32: sum of next-token losses of a batch [B, T] in nats, the number of tokens predicted, and of rows that
    did not fit the experts' buffers."""
    model = cast_weights(model, config.compute.precision)
    out = model(batch, router_bias, config.compute)
    targets, valid = next_targets(batch, 1)
    nats = cross_entropy(out.hidden, model.head[...], targets, valid)
    return jnp.stack([nats, jnp.sum(valid, dtype=jnp.float32), out.overflow.astype(jnp.float32)])
