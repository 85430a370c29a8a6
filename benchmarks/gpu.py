"""What the kernels reach on a GPU, beside the ceilings of the same card in the same run and what else JAX has; JSON.

    python -m benchmarks.gpu --out benchmarks/results/gpu.json

Ceilings (dense matmuls in bfloat16 and FP8, a copy); the grouped matmul of ours, of XLA, and of tokamax and PyTorch
where they are installed, at DeepSeek-V3's two shapes with even and skewed groups, forward and backward, in bfloat16 and
FP8; quantisation; attention; decoding; a training step of a V3-shaped slice. Every number is the median of the runs;
what fails or does not fit says why, and the rest goes on. --smoke: tiny shapes, to see on any machine that it runs.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch wants memory too

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import machine
from dsjax.config import ComputeConfig, Config, DataConfig, ModelConfig, OptimizerConfig
from dsjax.plan import count

RUNS, LEAST_S = 10, 0.02  # runs that the median is of, and how long one takes at least
SHAPES = {"V3 up": (4, 8192, 7168, 4096), "V3 down": (8, 4096, 2048, 7168)}  # experts, rows of each, K, N
SMOKE = {"smoke": (2, 128, 128, 128)}


class Report:
    """Rows of results, written after each, so that a run cut short leaves what it had."""

    def __init__(self, out: Path | None):
        self.out = out
        self.result: dict[str, Any] = {
            "command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]),
            "machine": machine(),
            "device": jax.devices()[0].device_kind,
            "rows": [],
        }

    def add(self, name: str, measure: Callable[[], dict[str, Any]], **facts) -> dict[str, Any]:
        """A row: what is measured, or why it could not be."""
        begun = time.perf_counter()
        try:
            row = measure()
        except Exception as error:  # whatever a library raises: the other rows are wanted
            row = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"}
        row = {"name": name, **facts, **row, "wall_s": round(time.perf_counter() - begun, 1)}
        self.result["rows"].append(row)
        print(json.dumps(row), flush=True)
        if self.out:
            self.out.write_text(json.dumps(self.result, indent=1) + "\n")
        return row


def median_s(f: Callable, *arguments) -> float:
    """Seconds of one call, the median of RUNS runs of as many calls as take LEAST_S together."""
    jax.block_until_ready(f(*arguments))

    def run(calls: int) -> float:
        begun = time.perf_counter()
        for _ in range(calls):
            out = f(*arguments)
        jax.block_until_ready(out)
        return (time.perf_counter() - begun) / calls

    calls = max(1, round(LEAST_S / run(3)))
    return statistics.median(run(calls) for _ in range(RUNS))


def flops(work: float, f: Callable, *arguments) -> dict[str, Any]:
    """TFLOP/s of a jitted f that does `work` FLOPs."""
    seconds = median_s(jax.jit(f), *arguments)
    return {"ms": seconds * 1e3, "tflops": work / seconds / 1e12}


def bandwidth(moved: float, f: Callable, *arguments) -> dict[str, Any]:
    """GB/s of a jitted f that has to move this many bytes."""
    seconds = median_s(jax.jit(f), *arguments)
    return {"ms": seconds * 1e3, "gb_per_s": moved / seconds / 1e9}


def normal(*shape: int, seed: int = 0, dtype=jnp.bfloat16) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def ceilings(report: Report, smoke: bool) -> None:
    from pallas_kernels.quantise import E4M3

    m, k, n = (256, 256, 256) if smoke else (8192, 7168, 4096)
    x, w = normal(m, k), normal(k, n, seed=1)
    report.add("dense bf16", lambda: flops(2 * m * k * n, jnp.matmul, x, w), shape=[m, k, n])
    x8, w8 = x.astype(E4M3), w.T.astype(E4M3)

    def fp8(x, w):
        return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16)

    report.add("dense fp8", lambda: flops(2 * m * k * n, fp8, x8, w8), shape=[m, k, n])
    big = normal(1 << (16 if smoke else 29))
    report.add("copy", lambda: bandwidth(2 * big.nbytes, lambda a: a + 1, big), bytes=2 * big.nbytes)


def grouped(report: Report, smoke: bool) -> None:
    for name, (e, rows, k, n) in (SMOKE if smoke else SHAPES).items():
        even = np.full(e, rows)
        skewed = np.full(e, rows // 256 * 128)
        skewed[0] += even.sum() - skewed.sum()  # more than half of the rows are of one expert
        for groups, sizes in (("even", even), ("skewed", skewed)):
            _grouped(functools.partial(report.add, shape=name, groups=groups), e, k, n, sizes, smoke)


def _grouped(add, e: int, k: int, n: int, group_sizes: np.ndarray, smoke: bool) -> None:
    from pallas_kernels.grouped_matmul import grouped_matmul
    from pallas_kernels.quantise import Tile, quantise
    from pallas_kernels.scaled_matmul import scaled_gradient, scaled_matmul

    aligned, sizes, m = {"alignment": 128}, jnp.asarray(group_sizes, jnp.int32), int(group_sizes.sum())
    work = 2 * m * k * n
    x, w, dy = normal(m, k), normal(e, k, n, seed=1), normal(m, n, seed=2)

    def gradients(multiply):
        return lambda x, w, dy, sizes: jax.vjp(lambda x, w: multiply(x, w, sizes), x, w)[1](dy)

    for side, options in (("tiles" if smoke else "pallas_gpu", aligned), ("ragged_dot", {})):
        multiply = functools.partial(grouped_matmul, implementation=side, **options)
        add(f"{side} bf16 forward", functools.partial(flops, work, multiply, x, w, sizes))
        add(f"{side} bf16 backward", functools.partial(flops, 2 * work, gradients(multiply), x, w, dy, sizes))
    add("tokamax bf16 forward", lambda: flops(work, _tokamax(), x, w, sizes))
    add("torch bf16 forward", lambda: _torch_grouped(e, m, k, n, group_sizes, work))

    row, column, block = Tile(1, 128), Tile(128, 1), Tile(128, 128)
    x8, w8, dy8, xt, dyt = (
        quantise(a, tile) for a, tile in ((x, row), (w, block), (dy, row), (x, column), (dy, column))
    )
    forward = functools.partial(scaled_matmul, **aligned)
    backward = functools.partial(scaled_matmul, transposed=True, **aligned)
    gradient = functools.partial(scaled_gradient, dtype=jnp.bfloat16, **aligned)
    add("fp8 forward", lambda: flops(work, forward, x8, w8, sizes))
    add("fp8 gradient of x", lambda: flops(work, backward, dy8, w8, sizes))
    add("fp8 gradient of w", lambda: flops(work, gradient, xt, dyt, sizes))


def _tokamax():
    import tokamax

    return lambda x, w, sizes: tokamax.ragged_dot(x, w, sizes)


def _torch_grouped(e: int, m: int, k: int, n: int, sizes: np.ndarray, work: float) -> dict[str, Any]:
    import torch

    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(e, k, n, device="cuda", dtype=torch.bfloat16)
    stops = torch.tensor(np.cumsum(sizes), device="cuda", dtype=torch.int32)
    times = []
    for _ in range(RUNS + 3):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        torch._grouped_mm(x, w, offs=stops)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    seconds = statistics.median(times[3:])
    return {"ms": seconds * 1e3, "tflops": work / seconds / 1e12}


def quantisation(report: Report, smoke: bool) -> None:
    from pallas_kernels.quantise import Tile, quantise

    m, k = (256, 256) if smoke else (32768, 7168)
    x = normal(m, k)
    for tile in (Tile(1, 128), Tile(128, 1), Tile(128, 128), Tile(1, 128, ue8m0=True)):
        scales = -(-m // tile.rows) * -(-k // tile.columns)
        moved = 3 * m * k + 4 * scales
        run = functools.partial(quantise, tile=tile)
        report.add(f"quantise {tuple(tile)}", lambda run=run, moved=moved: bandwidth(moved, run, x), shape=[m, k])


def attention(report: Report, smoke: bool) -> None:
    from dsjax.model.attention import attend
    from sharding.mesh import make_mesh
    from sharding.rules import constrain

    b, t, h = (1, 128, 2) if smoke else (1, 4096, 128)
    q, k, v = normal(b, t, h, 192), normal(b, t, h, 192, seed=1), normal(b, t, h, 128, seed=2)
    ids, scale = jnp.ones((b, t), jnp.int32), 192**-0.5
    work = b * h * t * t * (192 + 128)  # of the causal half, two FLOPs each

    def ours(q, k, v):
        heads = (constrain(a, "batch", "seq", "heads", None) for a in (q, k, v))
        return attend(*heads, constrain(ids, "batch", "seq"), scale)

    def by_jax(implementation, q, k, v):  # which wants values as wide as keys
        v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, 64)))
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True, scale=scale, implementation=implementation)
        return y[..., :128]

    def tokamax(q, k, v):
        import tokamax

        return tokamax.dot_product_attention(q, k, v, is_causal=True, scale=scale)

    def both(f):
        def forward_and_backward(q, k, v):
            y, pull = jax.vjp(f, q, k, v)
            return pull(y)

        return forward_and_backward

    sides = {"XLA": functools.partial(by_jax, "xla"), "cuDNN": functools.partial(by_jax, "cudnn"), "tokamax": tokamax}
    for name, f in sides.items():
        report.add(f"attention {name} forward", functools.partial(flops, work, f, q, k, v))
        report.add(f"attention {name} both ways", functools.partial(flops, 3.5 * work, both(f), q, k, v))
    with jax.set_mesh(make_mesh(jax.devices()[:1])):
        report.add("attention ours forward", functools.partial(flops, work, ours, q, k, v))
        report.add("attention ours both ways", functools.partial(flops, 3.5 * work, both(ours), q, k, v))


def decoding(report: Report, smoke: bool) -> None:
    """Attention of new tokens on V3's latent cache, whole and in pages: a large batch, and one row with two tokens."""
    from pallas_kernels.latent_attention import latent_attention
    from pallas_kernels.paged_attention import paged_attention

    (h, c, r, s), page = (4, 128, 64, 128) if smoke else (128, 512, 64, 8192), 128
    for b, t in ((2, 1), (1, 2)) if smoke else ((64, 1), (1, 2)):
        arrays = normal(b, t, h, c), normal(b, t, h, r, seed=1), normal(b, s, c, seed=2), normal(b, s, r, seed=3)
        length, moved = jnp.full(b, s - t), 2 * b * s * (c + r)
        for side in ("auto", "reference"):
            run = functools.partial(latent_attention, scale=192**-0.5, implementation=side)
            measure = functools.partial(bandwidth, moved, run, *arrays, length)
            report.add(f"decoding on the latent cache {side}", measure, shape=[b, t, h, s])
            run = functools.partial(paged_attention, scale=192**-0.5, implementation=side)
            pages = (a.reshape(1, b * s // page, page, -1) for a in arrays[2:])
            table = jax.random.permutation(jax.random.key(4), b * s // page).reshape(b, -1)
            measure = functools.partial(bandwidth, moved, run, *arrays[:2], *pages, table, length, jnp.int32(0))
            report.add(f"decoding on pages of the latent cache {side}", measure, shape=[b, t, h, s])


def training_step(report: Report, smoke: bool, peak: float | None) -> None:
    """A dense layer and a MoE layer of V3's shape, with a small vocabulary."""
    from dsjax.train.layout import device_mesh, on_mesh
    from dsjax.train.schedule import Knobs
    from dsjax.train.step import jit_init_state, jit_train_step

    wide = {"hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_attention_heads": 128}
    narrow = {"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128, "num_attention_heads": 2}
    model = ModelConfig(
        vocab_size=512 if smoke else 8192,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        q_lora_rank=128 if smoke else 1536,
        kv_lora_rank=128 if smoke else 512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=4 if smoke else 32,
        num_experts_per_tok=2 if smoke else 8,
        routed_scaling_factor=2.5,
        **(narrow if smoke else wide),
    )
    rows, seq = (1, 128) if smoke else (2, 4096)
    for precision in ("bf16", "fp8_deepseek"):

        def measure(precision=precision) -> dict[str, Any]:
            config = Config(
                batch_size=rows,
                seq_len=seq,
                model=model,
                optimizer=OptimizerConfig(peak_lr=1e-4, schedule="constant", warmup_steps=0),
                data=DataConfig(document_mask=False),
                compute=ComputeConfig(precision=precision, remat="deepseek"),
            )
            tokens = np.random.default_rng(0).integers(0, model.vocab_size, (1, rows, seq)).astype(np.int32)
            arrays = {
                "tokens": tokens,
                "segment_ids": np.ones_like(tokens),
                "positions": np.broadcast_to(np.arange(seq, dtype=np.int32), tokens.shape),
            }
            mesh = device_mesh(config)
            with jax.set_mesh(mesh):
                state, step, batch = jit_init_state(config)(), jit_train_step(config), on_mesh(arrays, mesh)
                times = []
                for i in range(3 + RUNS):
                    begun = time.perf_counter()
                    state, metrics = step(state, batch, Knobs(i, 1e-4, 0.0, 0.001, 1))
                    loss = float(metrics.loss)
                    times.append(time.perf_counter() - begun)
            seconds = statistics.median(times[3:])
            work = count.train_flops(model, seq) * rows * seq
            found = {"ms": seconds * 1e3, "tokens_per_s": rows * seq / seconds, "loss": loss, "first_s": times[0]}
            found |= {"tflops": work / seconds / 1e12, "overflow": int(metrics.overflow)}
            return found | ({"mfu_of_dense_bf16": work / seconds / 1e12 / peak} if peak else {})

        report.add(f"training step {precision}", measure, batch=[rows, seq])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON goes here, after each row")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    parser.add_argument(
        "--only", metavar="PART", help="ceilings, grouped, quantisation, attention, decoding or training_step"
    )
    arguments = parser.parse_args()
    report = Report(arguments.out)
    for part in (ceilings, grouped, quantisation, attention, decoding):
        if arguments.only in (None, part.__name__):
            part(report, arguments.smoke)
    if arguments.only in (None, "training_step"):
        dense = next((row for row in report.result["rows"] if row["name"] == "dense bf16"), {})
        training_step(report, arguments.smoke, dense.get("tflops"))


if __name__ == "__main__":
    main()
