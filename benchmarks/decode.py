"""Cached greedy decoding on CPU at batch 1 and 8: dsjax against transformers' DeepseekV3ForCausalLM.

    python -m benchmarks.decode --out benchmarks/results/decode.json

Same shape, float32, two threads, prompts of random tokens; each side in its own process. The best of three runs after
one that compiles; prefill is timed alone and taken off.
"""

import time
from pathlib import Path

import numpy as np

from benchmarks import common

BATCHES = (1, 8)
REPEATS = 8


def prompts(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(8, common.SHAPE["vocab_size"], (batch, length))


def measure(generate, prompt: int, new: int) -> dict:
    """generate(batch, n) makes n tokens a row; tokens a second of decoding, prefill and first token taken off."""
    result = {}
    for batch in BATCHES:
        generate(batch, new)
        generate(batch, 1)
        seconds, cpu, first = [], [], []
        for _ in range(REPEATS):
            start = time.perf_counter()
            generate(batch, 1)
            first.append(time.perf_counter() - start)
            start, cpu_start = time.perf_counter(), time.process_time()
            generate(batch, new)
            seconds.append(time.perf_counter() - start)
            cpu.append(time.process_time() - cpu_start)
        tokens = batch * (new - 1)
        result[f"batch_{batch}"] = {
            "tokens_per_s": tokens / (min(seconds) - min(first)),
            "tokens_per_cpu_s": tokens / min(cpu),
            "prefill_s": min(first),
        }
    return result | {"peak_memory_gib": common.peak_memory_gib()}


def dsjax(prompt: int, new: int) -> dict:
    import jax
    from flax import nnx

    from dsjax.config import ComputeConfig, Config, EngineConfig, ModelConfig
    from dsjax.hub.load import Loaded
    from dsjax.infer.generate import generate_tokens
    from dsjax.model.transformer import DeepSeek, init_router_bias
    from sharding.mesh import make_mesh

    cfg = ModelConfig(**common.SHAPE)
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        model = jax.jit(lambda: DeepSeek(cfg, rngs=nnx.Rngs(0)))()
        compute = ComputeConfig(precision="float32")
        loaded = Loaded(model, init_router_bias(cfg), mesh, Config(model=cfg, seq_len=256, compute=compute), Path())

        def generate(batch, n):
            rows = prompts(batch, prompt).tolist()
            options = EngineConfig(max_rows=batch, n_draft=0, max_model_len=prompt + new)
            out = np.array(generate_tokens(loaded, rows, options=options, max_tokens=n, temperature=0.0))
            assert out.shape == (batch, n)

        return measure(generate, prompt, new)


def transformers(prompt: int, new: int) -> dict:
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.set_num_threads(common.THREADS)
    torch.manual_seed(0)
    shape = {**common.SHAPE, "num_key_value_heads": common.SHAPE["num_attention_heads"]}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**shape)).eval()

    def generate(batch, n):
        ids = torch.tensor(prompts(batch, prompt))
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n,
            min_new_tokens=n,
            do_sample=False,
            pad_token_id=0,
        )
        assert out.shape == (batch, prompt + n)

    return measure(generate, prompt, new)


def summary(results: dict) -> dict:
    ours, theirs = results["dsjax"], results["transformers"]
    if "error" in ours or "error" in theirs:
        return {}
    names = [f"batch_{batch}" for batch in BATCHES]
    return {"speed_ratio": {name: ours[name]["tokens_per_s"] / theirs[name]["tokens_per_s"] for name in names}}


if __name__ == "__main__":
    sides = {"dsjax": dsjax, "transformers": transformers}
    common.run("benchmarks.decode", __doc__, sides, summary, prompt=64, new=128)
