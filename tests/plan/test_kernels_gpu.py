"""The kernels for Hopper GPUs compile for an H100, at DeepSeek-V3's shapes, without a spilled register."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from benchmarks.kernels_gpu import assembled, compiler, description, moved

ROOT = Path(__file__).parents[2]
installed = pytest.mark.skipif(compiler() is None, reason="XLA's compiler for GPUs is not installed")


@pytest.mark.slow
@installed
@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="needs JAX 0.11")
def test_no_kernel_spills_and_no_tensor_core_instruction_waits_for_the_one_before(tmp_path):
    out = tmp_path / "kernels.json"
    command = [sys.executable, "-m", "benchmarks.kernels_gpu", "--out", str(out)]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=500)
    kernels = [row for row in json.loads(out.read_text())["kernels"] if not row["kernel"].startswith("XLA")]
    assert len(kernels) == 24
    for row in kernels:
        assert row["spilled_bytes"] == 0 and not row["in_sequence"] and row["registers"] <= 168, row
        if row["kernel"].startswith("quantise"):
            r, c = map(int, row["shape"].split(","))
            assert 3 * r * c < row["moved_bytes"] < 3.2 * r * c, row  # two bytes read and one written, and the scales
        else:
            assert row["wgmma"] >= 4, row


@installed
def test_a_gpu_that_the_compiler_does_not_know_is_named():
    assert "core_count: 132" in description("NVIDIA H100 80GB HBM3")
    with pytest.raises(ValueError, match="NVIDIA H999: not known to XLA's compiler"):
        description("NVIDIA H999")


def test_bytes_of_what_a_program_runs_are_added_up():
    text = """HloModule jit_f

ENTRY %main (x: bf16[8,4]) -> (f32[8], bf16[8,4]) {
  %x = bf16[8,4]{1,0} parameter(0)
  %flat = bf16[32]{0} bitcast(%x)
  %sums = (f32[8]{0}, f32[8]{0}) fusion(%flat), kind=kInput, calls=%sums_of
  %first = f32[8]{0} get-tuple-element(%sums), index=0
  %scaled = bf16[8,4]{1,0} fusion(%x, %first), kind=kLoop, calls=%scaling
  ROOT %out = (f32[8]{0}, bf16[8,4]{1,0}) tuple(%first, %scaled)
}
"""
    assert moved(text) == (64 + 32 + 32) + (64 + 32 + 64)


def test_what_the_assembler_says_is_read():
    text = """ptxas info    : Function properties for kernel
    8 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 90 registers, used 16 barriers
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ..."""
    assert assembled(text) == {"registers": 90, "spilled_bytes": 32, "in_sequence": True}
