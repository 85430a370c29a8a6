"""The kernels for TPUs compile for every chip, within the schedules that were reached (docs/kernels.md)."""

import importlib.util
import json
import subprocess
import sys

import pytest

from benchmarks.exchange import TOPOLOGIES
from benchmarks.kernels import in_own_process

SHAPE = "4,8192,7168,2048"  # experts, rows, K, N; the schedule of a tile is that of 16 experts
# By chip and kernel: the least share of cycles in which the matrix units must be busy, the most time over that of
# matrix units always busy with bfloat16.
BUDGETS = [
    ("v6e", "grouped_matmul", SHAPE, "ours forward", 0.95, 1.05),
    ("v6e", "grouped_matmul", SHAPE, "ours dw", 0.85, 1.15),
    ("v6e", "grouped_swiglu", SHAPE, "ours training", 0.95, 1.05),
    ("v5e", "grouped_matmul", SHAPE, "ours dw", 1.0, 1.0),
    ("v5p", "grouped_matmul", SHAPE, "ours dw", 1.0, 1.0),
    ("tpu7x", "grouped_matmul", SHAPE, "ours dw", 1.0, 1.0),
    ("tpu7x", "scaled_matmul", SHAPE, "fp8 512 forward", 0.5, 0.8),
    ("v6e", "latent_attention", "64,128,512,64,8192", "ours decode", 0.2, 10.0),
    *((chip, "paged_attention", "64,128,512,64,8192,128", "ours decode", 0.2, 10.0) for chip in ("v5e", "v5p", "v6e")),
    *((chip, "paged_attention", "64,128,512,64,8192,128", "ours step", 0.2, 10.0) for chip in ("v5e", "v5p", "v6e")),
]


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the compiler for TPUs is not installed"),
]


@pytest.mark.parametrize("chip,kernel,shape,what,mxu,time", BUDGETS, ids=lambda value: str(value))
def test_schedules_are_within_budget(chip, kernel, shape, what, mxu, time):
    (row,) = in_own_process(chip, kernel, [shape], [what])
    assert "error" not in row, row
    assert row["mxu"] >= mxu and row["time"] <= time, row
    if what == "ours decode":  # the cache is read once
        assert row["hbm_bytes"] < 1.1 * 2 * 64 * 8192 * (512 + 64), row
        assert row["temporary_bytes"] < 4 << 20, row
    if what == "ours step":  # pages are written in place: rotated keys of all would be 67 MB
        assert row["temporary_bytes"] < 24 << 20, row


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_exchange_by_our_kernel_compiles_both_ways(topology):
    command = [
        sys.executable,
        "-m",
        "benchmarks.exchange",
        "--tokens=64",
        "--exchange=pallas_tpu",
        "--topology",
        topology,
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    flat, two_levels = json.loads(done.stdout)["results"]
    assert flat["kernels"] == 4 and two_levels["kernels"] == 8, done.stdout  # there and back, forward and backward
