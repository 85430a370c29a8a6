"""The claim that reinforcement learning from outcomes alone finds the long answers that pre-training made rare.

After arXiv:2510.11495: a model is trained from scratch on many short answers and few chains of thought for the parity
of bits (dsjax.posttrain.parity). It learns to go on with a chain long before it could say a parity at once, so that
its likeliest answer is a guess, and a chain that it happens to begin is right.
"""

import json
import random
from pathlib import Path
from typing import Any

from dsjax.config import (
    BalanceConfig,
    Config,
    DataConfig,
    EngineConfig,
    ModelConfig,
    OptimizerConfig,
)
from dsjax.files import write_text
from dsjax.hub.load import Loaded
from dsjax.infer.generate import generate_tokens
from dsjax.posttrain.parity import LETTERS, draw_bits, parity, parity_answer, parity_chain, parity_prompt, parity_short

N_BITS = 24
CHAIN_SHARE = 0.1  # of the documents
STEPS = 300


def base_model(seed: int = 0, steps: int = STEPS, n_bits: int = N_BITS) -> Config:
    """Two layers, one of them of experts, and a module of multi-token prediction, pre-trained in half a minute.

    A row is as long as two documents of the short form, or one of the long one. The RoPE base fits texts of 50 tokens.
    With Muon, 2,000 chains suffice; with AdamW, the parity of two bits stays unlearned for thousands of them.
    """
    return Config(
        name="parity",
        seed=seed,
        steps=steps,
        batch_size=32,
        seq_len=2 * (n_bits + 4),
        log_every=50,
        eval_every=steps,
        checkpoint_every=steps,
        model=ModelConfig(
            vocab_size=262,
            hidden_size=64,
            intermediate_size=128,
            moe_intermediate_size=32,
            num_hidden_layers=2,
            num_nextn_predict_layers=1,
            num_attention_heads=2,
            kv_lora_rank=32,
            qk_nope_head_dim=16,
            qk_rope_head_dim=16,
            v_head_dim=32,
            n_routed_experts=8,
            num_experts_per_tok=2,
            first_k_dense_replace=1,
            routed_scaling_factor=1.5,
            rope_theta=100.0,
            max_position_embeddings=256,
            initializer_range=0.08,
        ),
        balance=BalanceConfig(sequence=1e-4),
        optimizer=OptimizerConfig(
            name="muon", peak_lr=1e-2, warmup_steps=30, schedule="cosine", final_lr_ratio=0.02, weight_decay=0.05
        ),
        data=DataConfig(tokenizer="bytes", packing="best_fit", heldout_fraction=0.003),
    )


def write_texts(
    folder: Path, n_documents: int = 40_000, chain_share: float = CHAIN_SHARE, seed: int = 0, n_bits: int = N_BITS
) -> Path:
    """parity.jsonl, a pure function of the arguments: no document has bits that are held out."""
    draw, lines = random.Random(seed), []
    for _ in range(n_documents):
        bits = draw_bits(draw, n_bits)
        answer = parity_chain(bits) if draw.random() < chain_share else parity_short(bits)
        lines.append(json.dumps({"text": parity_prompt(bits) + answer}) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "parity.jsonl", "".join(lines))
    return folder / "parity.jsonl"


def held_out_accuracy(
    loaded: Loaded, n: int = 256, temperature: float = 0.0, seed: int = 0, n_bits: int = N_BITS
) -> dict[str, Any]:
    """Of answers to n rows of held-out bits: how many are right, begin a chain, are right where they do (none: no
    answer does) and where they do not, and the tokens of an answer without its end, on average."""
    draw, tokenizer = random.Random(seed), loaded.tokenizer
    rows = [draw_bits(draw, n_bits, heldout=True) for _ in range(n)]
    prompts = [[tokenizer.bos_id, *tokenizer.encode(parity_prompt(bits))] for bits in rows]
    longest = 2 * n_bits + 8
    said = generate_tokens(
        loaded,
        prompts,
        options=EngineConfig(max_rows=min(n, 256), max_model_len=longest, page_size=64, prefill_chunk=8192, n_draft=0),
        max_tokens=longest - len(prompts[0]),
        temperature=temperature,
        seed=seed * n,
        stop_ids=tokenizer.eos_ids,
    )
    texts = [tokenizer.decode(tokens) for tokens in said]
    right = [parity_answer(text) == parity(bits) for bits, text in zip(rows, texts)]
    chain = [text[:1] in tuple(LETTERS.values()) for text in texts]
    return {
        "accuracy": sum(right) / n,
        "chain_share": sum(chain) / n,
        "accuracy_given_chain": _mean([r for r, c in zip(right, chain) if c]),
        "accuracy_given_short": _mean([r for r, c in zip(right, chain) if not c]),
        "mean_length": sum(map(len, texts)) / n,
    }


def _mean(values: list[bool]) -> float | None:
    return sum(values) / len(values) if values else None
