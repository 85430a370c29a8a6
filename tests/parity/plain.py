"""DeepSeek-V3 with multi-token prediction as plain numpy in float64, from the equations (reference 2.1, 3.2, 4).

Reads a config.json and weights by the Hub's names, (out, in), one row of tokens at a time; knows nothing of dsjax.
"""

import math

import numpy as np


class Plain:
    def __init__(self, raw: dict, tensors: dict[str, np.ndarray]):
        self.raw = raw
        self.w = {name: a.astype(np.float64) for name, a in tensors.items()}
        self.smallest_gap = np.inf  # between an expert or group taken and one left, over all that was computed

    def trunk(self, tokens: np.ndarray) -> np.ndarray:
        """Hidden states after the final norm, [T, D]."""
        x = self.w["model.embed_tokens.weight"][tokens]
        for layer in range(self.raw["num_hidden_layers"]):
            x = self._layer(x, f"model.layers.{layer}.", dense=layer < self.raw["first_k_dense_replace"])
        return self._norm(x, "model.norm")

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        return hidden @ self.w["lm_head.weight"].T

    def mtp_logits(self, tokens: np.ndarray) -> np.ndarray:
        """At i, from the trunk's hidden state at i and the token at i + 1, of the token at i + 2; [T - 1, V]."""
        at = f"model.layers.{self.raw['num_hidden_layers']}."
        hidden, embedding = self.trunk(tokens)[:-1], self.w["model.embed_tokens.weight"][tokens[1:]]
        both = np.concatenate([self._norm(embedding, f"{at}enorm"), self._norm(hidden, f"{at}hnorm")], axis=-1)
        x = self._layer(self._linear(both, f"{at}eh_proj"), at, dense=False)
        return self.logits(self._norm(x, f"{at}shared_head.norm"))

    def _layer(self, x, at, dense):
        x = x + self._attention(self._norm(x, f"{at}input_layernorm"), f"{at}self_attn.")
        y = self._norm(x, f"{at}post_attention_layernorm")
        return x + (self._swiglu(y, f"{at}mlp") if dense else self._moe(y, f"{at}mlp."))

    def _attention(self, x, at):
        raw, t, h = self.raw, len(x), self.raw["num_attention_heads"]
        nope, rope, c = raw["qk_nope_head_dim"], raw["qk_rope_head_dim"], raw["kv_lora_rank"]
        q = self._linear(self._norm(self._linear(x, f"{at}q_a_proj"), f"{at}q_a_layernorm"), f"{at}q_b_proj")
        q = q.reshape(t, h, nope + rope)
        latent = self._linear(x, f"{at}kv_a_proj_with_mqa")
        k_rope = self._rotate(latent[:, c:])  # one for all heads, not normed
        kv = self._linear(self._norm(latent[:, :c], f"{at}kv_a_layernorm"), f"{at}kv_b_proj").reshape(t, h, -1)
        out = []
        for i in range(h):
            scores = q[:, i, :nope] @ kv[:, i, :nope].T + self._rotate(q[:, i, nope:]) @ k_rope.T
            scores = np.where(np.tri(t, dtype=bool), scores * self._softmax_scale(), -np.inf)
            p = np.exp(scores - scores.max(-1, keepdims=True))
            out.append(p / p.sum(-1, keepdims=True) @ kv[:, i, nope:])
        return self._linear(np.concatenate(out, axis=-1), f"{at}o_proj")

    def _mscale(self, name):
        yarn = self.raw["rope_scaling"]
        return 0.1 * yarn[name] * math.log(yarn["factor"]) + 1

    def _softmax_scale(self):
        return self._mscale("mscale_all_dim") ** 2 / math.sqrt(
            self.raw["qk_nope_head_dim"] + self.raw["qk_rope_head_dim"]
        )

    def _rotate(self, x):
        """Pairs (x0, x1), (x2, x3), ... as complex numbers, turned by YaRN's frequencies; row t is position t."""
        yarn, dim, theta = self.raw["rope_scaling"], x.shape[-1], self.raw["rope_theta"]

        def pair(rotations):  # that turns so often over the original context
            return (
                dim * math.log(yarn["original_max_position_embeddings"] / rotations / 2 / math.pi) / 2 / math.log(theta)
            )

        low, high = max(math.floor(pair(yarn["beta_fast"])), 0), min(math.ceil(pair(yarn["beta_slow"])), dim - 1)
        turns = []
        for i in range(dim // 2):
            kept = 1 - min(max((i - low) / (high - low), 0), 1)
            turns.append(theta ** (-2 * i / dim) * (kept + (1 - kept) / yarn["factor"]))
        amplitude = self._mscale("mscale") / self._mscale("mscale_all_dim")
        turned = (x[:, 0::2] + 1j * x[:, 1::2]) * amplitude * np.exp(1j * np.outer(np.arange(len(x)), turns))
        return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)

    def _moe(self, x, at):
        out = self._swiglu(x, f"{at}shared_experts")
        for t, token in enumerate(x):
            scores = 1 / (1 + np.exp(-self.w[f"{at}gate.weight"] @ token))
            chosen = self._choose(scores + self.w[f"{at}gate.e_score_correction_bias"])
            weights = scores[chosen] / scores[chosen].sum() * self.raw["routed_scaling_factor"]
            for e, weight in zip(chosen, weights):
                out[t] += weight * self._swiglu(token, f"{at}experts.{e}")
        return out

    def _choose(self, biased):
        groups = biased.reshape(self.raw["n_group"], -1)
        kept = self._best(np.sort(groups)[:, -2:].sum(-1), self.raw["topk_group"])
        allowed = np.full(groups.shape, -np.inf)
        allowed[kept] = groups[kept]
        return self._best(allowed.ravel(), self.raw["num_experts_per_tok"])

    def _best(self, scores, n):
        order = np.argsort(-scores)
        self.smallest_gap = min(self.smallest_gap, scores[order[n - 1]] - scores[order[n]])
        return order[:n]

    def _swiglu(self, x, at):
        gate = self._linear(x, f"{at}.gate_proj")
        return self._linear(gate / (1 + np.exp(-gate)) * self._linear(x, f"{at}.up_proj"), f"{at}.down_proj")

    def _linear(self, x, name):
        return x @ self.w[f"{name}.weight"].T

    def _norm(self, x, name):
        mean_square = (x * x).mean(-1, keepdims=True)
        return x / np.sqrt(mean_square + self.raw["rms_norm_eps"]) * self.w[f"{name}.weight"]


def clear_tokens(plain: Plain, shape: tuple[int, int], gap: float) -> tuple[np.ndarray, np.ndarray]:
    """Tokens for which no router's choice is a matter of rounding, and their MTP logits [B, T - 1, V]."""
    for seed in range(200):
        tokens = np.random.RandomState(seed).randint(plain.raw["vocab_size"], size=shape)
        plain.smallest_gap = np.inf
        logits = np.stack([plain.mtp_logits(row) for row in tokens])
        if plain.smallest_gap > gap:
            return tokens, logits
    raise AssertionError("no input with a clear choice of experts")
