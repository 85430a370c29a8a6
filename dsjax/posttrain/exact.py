"""Sampling by the training forward pass itself: what a token is drawn from has the bits of what it is learned from.

For finding out whether a run that goes wrong does so because sampler and trainer differ. Every token takes a forward
pass of whole rows, without a cache.
"""

import functools
from collections import deque

import jax
import numpy as np

from dsjax.config import Config, replace
from dsjax.infer.requests import Request, Sampled
from dsjax.infer.sampling import sample
from dsjax.model.mtp import shift_left
from dsjax.model.transformer import DeepSeek
from dsjax.precision import cast_weights
from dsjax.state import Batch, RouterBias, Sampling
from dsjax.train.loss import all_logits, token_logprobs
from sharding.rules import constrain, spec


class ExactEngine:
    """Requests as `Engine` takes them, as far as policy optimisation asks: temperature, seed and ends. Experts are not
    recorded: in the first step that learns from them, the same bits choose the same ones."""

    def __init__(self, model: DeepSeek, router_bias: RouterBias, mesh, config: Config):
        self.n_rows, self.length, self.mesh = config.batch_size // config.accumulate, config.seq_len, mesh
        self.program = jax.jit(functools.partial(_forward, config=config))
        self.weights = model, router_bias
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._newest: dict[int, int] = {}  # by request the token whose log-probability is not known yet

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def renew(self, model: DeepSeek, router_bias: RouterBias) -> None:
        """Goes on with other weights."""
        self.weights = model, router_bias

    def submit(self, request: Request) -> None:
        """Takes a request. Raises ConfigError for one that cannot be done."""
        request.check(self.weights[0].cfg.vocab_size, self.length)
        request.tokens = list(request.prompt)
        self.waiting.append(request)

    def cancel(self, id: int) -> None:
        """Ends a request at once."""
        for request in [r for r in (*self.waiting, *self.running) if r.id == id]:
            (self.running if request in self.running else self.waiting).remove(request)
            self._newest.pop(id, None)
            request.done("cancelled")

    def run(self) -> None:
        """Steps until nothing is left."""
        while self.busy:
            self.step()

    def step(self) -> None:
        """One forward pass: of every row the log-probability of its newest token, and the token behind it."""
        while self.waiting and len(self.running) < self.n_rows:
            self.running.append(self.waiting.popleft())
        shape = self.n_rows, self.length
        tokens, segment_ids = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        lengths, temperature = np.ones(self.n_rows, np.int32), np.ones(self.n_rows, np.float32)
        seed = np.zeros(self.n_rows, np.uint32)
        for i, request in enumerate(self.running):
            n = len(request.tokens)
            tokens[i, :n], segment_ids[i, :n], lengths[i] = request.tokens, 1, n
            temperature[i], seed[i] = request.temperature, request.seed
        positions = np.broadcast_to(np.arange(self.length, dtype=np.int32), shape)
        rows = jax.NamedSharding(self.mesh, spec("batch", "seq"))
        batch = Batch(*(jax.device_put(a, rows) for a in (tokens, segment_ids, positions)))
        following, logp, _ = jax.device_get(self.program(*self.weights, batch, lengths, temperature, seed))
        for i, request in enumerate(list(self.running)):
            self._follow(request, int(following[i]), float(logp[i]))

    def _follow(self, request: Request, following: int, logp: float) -> None:
        if (token := self._newest.pop(request.id, None)) is not None:
            request.tell([Sampled(token, logp)])
            if reason := ("stop" if token in request.stop_ids else "length" * (request.n_new >= request.max_tokens)):
                self.running.remove(request)
                return request.done(reason)
        request.tokens.append(following)
        self._newest[request.id] = following
        return None


def _forward(model, router_bias, batch: Batch, lengths, temperature, seed, *, config: Config):
    """The token behind each row's `lengths`, the log-probability of its last one, and the entropies that the training
    step computes as well: without them the compiler sums in another order. No loads of experts but fit."""
    model = cast_weights(model, config.compute.precision)
    hidden = model(batch, router_bias, replace(config.compute, expert_buffer=None)).hidden
    targets = shift_left(batch.tokens, 1)
    logp, entropy = token_logprobs(hidden, model.head[...], targets, jax.numpy.float32(config.grpo.temperature))
    rows = jax.numpy.arange(len(lengths))
    lengths, temperature, seed = (constrain(a, "batch") for a in (lengths, temperature, seed))
    last = constrain(all_logits(hidden, model.head[...]), "batch", None, None)
    last = last.at[rows, lengths - 1].get(out_sharding=spec("batch", None))[:, None]
    none = jax.numpy.zeros_like(temperature)
    sampling = Sampling(temperature, none.astype("int32"), none + 1, none, seed)
    following = sample(last, sampling, lengths[:, None])[:, 0]
    before = constrain(logp, "batch", None).at[rows, jax.numpy.maximum(lengths - 2, 0)]
    return following, before.get(out_sharding=spec("batch")), entropy
