"""One whole training step (forward, backward, AdamW) on CPU: dsjax against transformers' DeepseekV3ForCausalLM.

    python -m benchmarks.train_step --out benchmarks/results/train_step.json

Same shape, float32, two threads, random tokens; each side in its own process, so that peak memory is its own.
"""

import itertools
import time

import numpy as np

from benchmarks import common


def tokens(batch: int, seq: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, common.SHAPE["vocab_size"], (batch, seq))


def measure(step, steps: int, n_tokens: int) -> dict:
    times, cpu = [], []
    for _ in range(steps + 1):
        start, cpu_start = time.perf_counter(), time.process_time()
        loss = step()
        times.append(time.perf_counter() - start)
        cpu.append(time.process_time() - cpu_start)
    return {
        "tokens_per_s": n_tokens / min(times[1:]),
        "step_s": times[1:],
        "step_cpu_s": cpu[1:],
        "first_step_s": times[0],
        "loss": loss,
        "peak_memory_gib": common.peak_memory_gib(),
    }


def dsjax(batch: int, seq: int, steps: int) -> dict:
    import jax

    from dsjax.config import ComputeConfig, Config, DataConfig, ModelConfig, OptimizerConfig
    from dsjax.train.layout import device_mesh, on_mesh
    from dsjax.train.schedule import Knobs
    from dsjax.train.step import jit_init_state, jit_train_step

    config = Config(
        batch_size=batch,
        seq_len=seq,
        model=ModelConfig(**common.SHAPE),
        optimizer=OptimizerConfig(peak_lr=1e-4, schedule="constant", warmup_steps=0),
        data=DataConfig(document_mask=False),
        compute=ComputeConfig(remat="deepseek"),
    )
    mesh = device_mesh(config)
    rows = tokens(batch, seq).astype(np.int32)
    arrays = {
        "tokens": rows,
        "segment_ids": np.ones_like(rows),
        "positions": np.broadcast_to(np.arange(seq, dtype=np.int32), rows.shape),
    }
    with jax.set_mesh(mesh):
        state = jit_init_state(config)()
        step_fn = jit_train_step(config)
        data = on_mesh({name: a[None] for name, a in arrays.items()}, mesh)

        steps_done = itertools.count()

        def step():
            nonlocal state
            state, metrics = step_fn(state, data, Knobs(next(steps_done), 1e-4, 0.0, 0.001, 1))
            return float(metrics.loss)

        return measure(step, steps, batch * seq)


def transformers(batch: int, seq: int, steps: int) -> dict:
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.set_num_threads(common.THREADS)
    torch.manual_seed(0)
    shape = {**common.SHAPE, "num_key_value_heads": common.SHAPE["num_attention_heads"]}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    ids = torch.tensor(tokens(batch, seq))

    def step():
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return measure(step, steps, batch * seq) | {"parameters": sum(p.numel() for p in model.parameters())}


def summary(results: dict) -> dict:
    ours, theirs = results["dsjax"], results["transformers"]
    if "error" in ours or "error" in theirs:
        return {}
    return {
        "speed_ratio": ours["tokens_per_s"] / theirs["tokens_per_s"],
        "memory_ratio": ours["peak_memory_gib"] / theirs["peak_memory_gib"],
    }


if __name__ == "__main__":
    sides = {"dsjax": dsjax, "transformers": transformers}
    common.run("benchmarks.train_step", __doc__, sides, summary, batch=8, seq=512, steps=3)
