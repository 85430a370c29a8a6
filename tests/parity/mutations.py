"""Known mistakes, each made in turn, and whether the parity checks see it.

    python tests/parity/mutations.py

Exits with 1 if a mistake passes. Needs no torch: the referees are golden/ and, for multi-token prediction, `plain`.
"""

import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import kinds
import make_golden
import numpy as np
import plain

from dsjax.config import replace
from dsjax.hub.load import load, logits
from dsjax.model import mla, moe, mtp, rope, router, transformer
from sharding.rules import spec

KIND = "v3"


@dataclasses.dataclass(frozen=True)
class Mistake:
    where: object  # module or class
    name: str  # of the function that `wrong` replaces
    wrong: Callable
    mtp: bool = False  # shows in the multi-token prediction alone


def _halves(x, cos, sin):
    if x.ndim == 4:
        cos, sin = cos[:, :, None], sin[:, :, None]
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def _amplified(positions, cfg, right=rope.rope_tables):
    s = cfg.rope_scaling
    cos, sin = right(positions, cfg)
    return cos * rope._amplitude(s.factor, s.mscale), sin * rope._amplitude(s.factor, s.mscale)


def _biased_weights(self, x, bias, right=router.Router.__call__, **options):
    routing = right(self, x, bias, **options)
    return routing.replace(weights=router.gate_weights(routing.scores + bias, routing.indices, self.cfg))


def _rank_by_best(scores, bias, cfg, right=router.choose_experts):
    v2 = replace(cfg, scoring_func="softmax", topk_method="group_limited_greedy")
    return right(scores + bias, bias, v2)


def _no_shared(self, x, bias, compute, replay):
    routing = self.router(x, bias)
    y, overflow = self.experts(x, routing, compute)
    return y, routing, overflow


def _raw_latent(self, x, rope_tables, scaling=None):
    latent = jnp.einsum("btd,dc->btc", x, self.wkv_a)
    c_kv, k_rope = jnp.split(latent, [self.cfg.kv_lora_rank], axis=-1)
    return mla.LatentCache(c_kv, mla.apply_rope(k_rope, *rope_tables))


def _hidden_first(self, embedding, hidden, scaling=None):
    both = jnp.concatenate([self.hnorm(hidden), self.enorm(embedding)], axis=-1)
    return jnp.einsum("btc,cd->btd", both, self.eh_proj, out_sharding=spec("batch", "seq", None))


def _with(right, **changes):
    """The function whose last argument, the configuration, is changed."""
    return lambda *args: right(*args[:-1], replace(args[-1], **changes))


_CHOOSE, _WEIGH = router.choose_experts, router.gate_weights
MISTAKES = {
    "RoPE rotates halves, not interleaved pairs": Mistake(mla, "apply_rope", _halves),
    "softmax scale without mscale": Mistake(mla, "softmax_scale", lambda cfg: cfg.qk_head_dim**-0.5),
    "mscale on cos and sin, too": Mistake(transformer, "rope_tables", _amplified),
    "no routed scaling factor": Mistake(router, "gate_weights", _with(_WEIGH, routed_scaling_factor=1.0)),
    "bias in the experts' weights": Mistake(router.Router, "__call__", _biased_weights),
    "bias not in the choice": Mistake(router, "choose_experts", lambda s, b, cfg: _CHOOSE(s, 0 * b, cfg)),
    "no group limit": Mistake(router, "choose_experts", _with(_CHOOSE, n_group=1, topk_group=1)),
    "groups ranked by their best, not best two": Mistake(router, "choose_experts", _rank_by_best),
    "weights not normalised": Mistake(router, "gate_weights", _with(_WEIGH, norm_topk_prob=False)),
    "no shared expert": Mistake(moe.MoE, "__call__", _no_shared),
    "no norm of the latent": Mistake(mla.MLA, "_latent", _raw_latent),
    "MTP reads hidden first, embedding second": Mistake(mtp.MTPInput, "__call__", _hidden_first, mtp=True),
}


def run(mistakes: dict[str, Mistake]) -> list[str]:
    """Prints the table; returns the mistakes that were not seen."""
    values, expected = make_golden.read(KIND)
    tensors = kinds.draw(kinds.MTP)
    referee = plain.Plain(kinds.MTP, tensors)
    mtp_tokens, mtp_expected = plain.clear_tokens(referee, (kinds.B, kinds.T), kinds.GAP)
    with tempfile.TemporaryDirectory() as folder:
        model = load(kinds.write_folder(Path(folder) / KIND, values["config"], kinds.draw(values["config"])), "float32")
        mtp_model = load(kinds.write_folder(Path(folder) / "mtp", kinds.MTP, tensors), "float32")

    def seen(mistake: Mistake | None, through_mtp: bool) -> tuple[bool, float, float]:
        jax.clear_caches()
        with mock.patch.object(mistake.where, mistake.name, mistake.wrong) if mistake else mock.MagicMock():
            if through_mtp:
                got, right = kinds.mtp_logits(mtp_model, mtp_tokens)[:, :-1], mtp_expected
            else:
                got, right = logits(model, np.array(values["tokens"])), expected
        try:
            kinds.check_logits(got, right)
        except AssertionError:
            return True, np.abs(got - right).max(), right.std()
        return False, np.abs(got - right).max(), right.std()

    missed = []
    print(f"{'mistake':42}  largest change  std of logits")
    for name, mistake in mistakes.items():
        caught, change, std = seen(mistake, mistake.mtp)
        print(f"{name:42}  {change:14.5f}  {std:13.2f}  {'caught' if caught else 'NOT CAUGHT'}", flush=True)
        missed += [] if caught else [name]
    for name, through_mtp in (("(none, after all others)", False), ("(none, MTP)", True)):
        caught, change, std = seen(None, through_mtp)
        print(f"{name:42}  {change:14.5f}  {std:13.2f}  {'CAUGHT' if caught else ''}", flush=True)
        missed += [f"{name} does not pass"] if caught else []
    jax.clear_caches()
    return missed


if __name__ == "__main__":
    sys.exit(1 if run(MISTAKES) else 0)
