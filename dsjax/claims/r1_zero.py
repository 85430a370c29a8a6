"""The claim that reinforcement learning from outcomes alone finds the long answers that pre-training made rare.

After arXiv:2510.11495: a model is trained from scratch on many short answers and few chains of thought for the parity
of bits (dsjax.posttrain.parity). It learns to go on with a chain long before it could say a parity at once, so that
its likeliest answer is a guess, and a chain that it happens to begin is right.
"""

import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsjax.claims import runs
from dsjax.config import (
    BalanceConfig,
    Config,
    DataConfig,
    EngineConfig,
    GrpoConfig,
    ModelConfig,
    OptimizerConfig,
    replace,
)
from dsjax.files import replacing, write_json, write_text
from dsjax.hub.load import Loaded, load
from dsjax.infer.generate import generate_tokens
from dsjax.posttrain.parity import (
    LETTERS,
    Parity,
    draw_bits,
    parity,
    parity_answer,
    parity_chain,
    parity_prompt,
    parity_short,
)
from dsjax.posttrain.problem import Problem
from dsjax.train import loop
from dsjax.train.lines import read_lines

N_BITS = 24
CHAIN_SHARE = 0.1  # of the documents
STEPS = 300
ANSWERS, GROUP = 256, 8  # of a step, and to a prompt
MORE_SEED = 10_000  # of the documents of more pre-training
SOLVED, CHANCE = 0.95, 0.1  # accuracy that is a success; distance to one half that is chance
TOGETHER = 0.8  # least correlation of accuracy and length over the evaluations
CONTROLS = {"more": "more pre-training", "shuffled": "shuffled rewards", "no_chain": "base without chains"}


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


def rl_model(base: Config, steps: int) -> Config:
    """GRPO from the outcome alone, with DeepSeekMath's weight of the distance to the base (arXiv:2402.03300): without
    it, rewards that mean nothing lead the model astray in time."""
    return replace(
        base,
        batch_size=ANSWERS,
        seq_len=64,
        steps=steps,
        log_every=1,
        eval_every=5,
        checkpoint_every=steps,
        optimizer=OptimizerConfig(peak_lr=2e-4, warmup_steps=0, schedule="constant", weight_decay=0.0),
        mtp=replace(base.mtp, loss_weight=0.1, loss_weight_final=0.1),
        grpo=GrpoConfig(
            task=f"parity:{N_BITS}",
            style="plain",
            group_size=GROUP,
            max_tokens=N_BITS + 6,
            objective="r1",
            kl_weight=0.04,
            eval_prompts=256,
            eval_samples=1,
            eval_temperature=0.0,
        ),
    )


class Shuffled(Parity):
    """The same problems, and each group's rewards dealt out among its answers at random."""

    def judge(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[dict[str, float]]:
        right = super().judge(problems, texts)
        if len({problem.prompt for problem in problems}) > 1:  # an evaluation, which asks many
            return right
        seed = hashlib.sha256(f"{self.seed} {problems[0].prompt}".encode()).digest()
        return random.Random(seed).sample(right, len(right))


def test(config: Config, n_seeds: int, rl_steps: int, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Trains what is not trained yet, from n_seeds seeds on from the configuration's; writes claim.json and claim.png.

    Raises ConfigError if a training was stopped, or is one of another configuration.
    """
    began, found = time.perf_counter(), {}
    runs.only_of(folder, replace(config, seed=0), rl_steps=rl_steps)
    # As many tokens forward and backward as the learning, and the forward passes of sampling and reference, each a
    # third as dear, had all answers been as long as a chain.
    learned = rl_steps * ANSWERS * 2 * (N_BITS + 2)
    more_steps = math.ceil(learned * 5 / 3 / (config.batch_size * config.seq_len))
    for seed in range(config.seed, config.seed + n_seeds):
        here, cfg = folder / f"seed-{seed}", replace(config, seed=seed)
        bases = {}
        for name, share in (("base", CHAIN_SHARE), ("no_chain_base", 0.0)):
            text = write_texts(folder / f"text-{seed}-{share}", chain_share=share, seed=seed)
            bases[name] = replace(cfg, data=replace(cfg.data, sources=(str(text),)))
            runs.pretrained(bases[name], here / name, None, say)
        fresh = write_texts(folder / f"text-{seed}-more", seed=MORE_SEED + seed)  # as the questions of GRPO are
        longer = replace(bases["base"], steps=more_steps, data=replace(cfg.data, sources=(str(fresh),)))
        runs.pretrained(longer, here / "more", here / "base", say)
        task = Parity(N_BITS, seed)
        asked = {
            "rl": ("base", task),
            "shuffled": ("base", Shuffled(N_BITS, seed)),
            "no_chain": ("no_chain_base", task),
        }
        for name, (base, of) in asked.items():
            runs.reinforced(rl_model(bases[base], rl_steps), here / name, here / base, say, of)
        found[seed] = {
            "before": held_out_accuracy(load(here / "base")),
            "before_sampled": held_out_accuracy(load(here / "base"), n=1024, temperature=1.0),
            "more": held_out_accuracy(load(here / "more")),
            "curves": {name: _curves(here / name) for name in asked},
        }
    result = compare(found)
    whole = {
        **result,
        "command": f"dsjax claims r1_zero --seed={config.seed} --seeds={n_seeds} --steps={config.steps} "
        f"--rl-steps={rl_steps}",
        "bits": N_BITS,
        "chain_share": CHAIN_SHARE,
        "steps": {"pre-training": config.steps, "reinforcement": rl_steps, "more": more_steps},
        "answers": {"a step": ANSWERS, "a prompt": GROUP},
        "seconds": round(time.perf_counter() - began, 1),
        "machine": loop.machine(),
    }
    write_json(folder / "claim.json", whole)
    draw(result["seeds"], folder / "claim.png")
    return whole


def compare(found: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Whether greedy accuracy on held-out bits goes from chance to SOLVED in two thirds of the seeds, with longer
    answers as it rises, while the controls stay at chance."""
    seeds = {}
    for seed, of in found.items():
        curves = of["curves"]
        rl, ends = curves["rl"], {name: curve["accuracy"][-1] for name, curve in curves.items()}
        ends["more"] = of["more"]["accuracy"]
        seeds[seed] = {
            **of,
            "accuracy": ends,
            "length": {"before": rl["length"][0], "after": rl["length"][-1]},
            "together": _correlation(rl["accuracy"], rl["length"]),
            "solved": bool(
                _is_chance(rl["accuracy"][0]) and ends["rl"] >= SOLVED and rl["length"][-1] > 2 * rl["length"][0]
            ),
            "flat": _is_chance(ends["more"])
            and all(_is_chance(a) for name in ("shuffled", "no_chain") for a in curves[name]["accuracy"]),
        }
    n_solved = sum(of["solved"] and of["together"] > TOGETHER for of in seeds.values())
    flat = all(of["flat"] for of in seeds.values())
    return {
        "claim": f"accuracy from chance to {SOLVED:.0%} with longer answers in two of three seeds, controls at chance",
        "holds": bool(3 * n_solved >= 2 * len(seeds) and flat),
        "seeds": seeds,
    }


def table(result: dict[str, Any]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Head and rows: of every seed greedy accuracy on held-out bits, and tokens of an answer."""
    head = ["seed", "before", "chains", "after", "tokens", *CONTROLS.values()]
    rows = [
        (
            str(seed),
            f"{of['before']['accuracy']:.1%}",
            f"{of['before_sampled']['chain_share']:.1%}",
            f"{of['accuracy']['rl']:.1%}",
            f"{of['length']['before']:.1f} to {of['length']['after']:.1f}",
            *(f"{of['accuracy'][name]:.1%}" for name in CONTROLS),
        )
        for seed, of in result["seeds"].items()
    ]
    return head, rows


def draw(seeds: dict[int, dict[str, Any]], path: Path) -> None:
    """Accuracy and length over the steps of every seed, with the controls, as PNG."""
    import matplotlib
    from matplotlib.figure import Figure

    from dsjax.train.picture import BLUE, GREEN, GREY, INK, ORANGE, STYLE

    colours = {"rl": BLUE, "shuffled": ORANGE, "no_chain": GREEN}
    names = {"rl": "GRPO from the outcome", **CONTROLS}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 4.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        for i, of in enumerate(seeds.values()):
            for name, colour in colours.items():
                curve, label = of["curves"][name], names[name] if i == 0 else None
                for panel, key in ((left, "accuracy"), (right, "length")):
                    panel.plot(curve["at"], curve[key], "o-", color=colour, ms=3, lw=1.4, alpha=0.8, label=label)
            last = of["curves"]["rl"]["at"][-1]
            left.plot([0, last], [of["before"]["accuracy"], of["accuracy"]["more"]], "s:", color=GREY, ms=4, lw=1.2,
                      label=names["more"] if i == 0 else None)  # fmt: skip
            right.plot([0, last], [of["before"]["mean_length"] + 1, of["more"]["mean_length"] + 1], "s:", color=GREY,
                       ms=4, lw=1.2)  # fmt: skip
        left.axhline(SOLVED, color=INK, lw=0.8, ls="--")
        left.set(title=f"Held-out accuracy, greedy; dashed: {SOLVED:.0%}", xlabel="step of GRPO", ylim=(0, 1.03))
        right.set(title="Tokens of a greedy answer", xlabel="step of GRPO", ylim=(0, N_BITS + 4))
        left.legend()
        with replacing(path) as file:
            figure.savefig(file, dpi=110)


def _curves(run: Path) -> dict[str, list[float]]:
    """Held-out accuracy and length of greedy answers by step, and every step's own reward and length."""
    rows = list(read_lines(run / "metrics.jsonl"))
    held, steps = ([row for row in rows if row["kind"] == kind] for kind in ("eval", "train"))
    return {
        "at": [row["step"] for row in held],
        "accuracy": [row["pass_1"] for row in held],
        "length": [row["heldout_length"] for row in held],
        "reward": [row["reward"] for row in steps],
        "answer_length": [row["length"] for row in steps],
    }


def _is_chance(accuracy: float) -> bool:
    return abs(accuracy - 0.5) <= CHANCE


def _correlation(a: list[float], b: list[float]) -> float:
    """0 where one of them does not change."""
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) and np.ptp(b) else 0.0


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
