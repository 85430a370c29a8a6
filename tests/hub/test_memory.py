"""Converting holds pieces of tensors, never the model: a limit on the address space shows it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import resource, sys
import jax
jax.devices()
with open("/proc/self/status") as file:
    used = next(int(line.split()[1]) for line in file if line.startswith("VmSize")) << 10
limit = used + int(float(sys.argv[1]) * 1e9)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
from dsjax.hub.convert import export_checkpoint, import_checkpoint
import_checkpoint(sys.argv[2], sys.argv[3], progress=False)
export_checkpoint(sys.argv[3], sys.argv[4], progress=False)
"""
MAKE = """
import sys
from pathlib import Path
import ml_dtypes, numpy as np
sys.path[:0] = ["tests", "tests/hub"]
import checkpoints
from dsjax.hub.files import Planned, plan_shards, write_shards
from dsjax.hub.names import hub_tensors

cfg = checkpoints.replace(
    checkpoints.models.v3(), vocab_size=int(sys.argv[2]), hidden_size=2048, moe_intermediate_size=1408,
    n_routed_experts=64, num_hidden_layers=4, intermediate_size=10944)
planned = [Planned(t.name, "BF16", t.shape) for t in hub_tensors(cfg)]
block = np.random.default_rng(0).normal(size=1 << 24).astype(ml_dtypes.bfloat16)  # the same 32 MiB again and again

def rows():
    for t in planned:
        left = t.n_bytes // 2
        while left:
            yield block[: min(left, len(block))]
            left -= min(left, len(block))

checkpoints.write_config(Path(sys.argv[1]), cfg)
write_shards(Path(sys.argv[1]), plan_shards(planned, 2_000_000_000), rows())
print(sum(t.n_bytes for t in planned))
"""


def run(script: str, *args) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, args)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_four_gigabytes_are_converted_in_one_and_a_half(tmp_path):
    size = int(run(MAKE, tmp_path / "hub", 100_000).split()[-1])
    assert size >= 4e9
    run(SCRIPT, 1.5, tmp_path / "hub", tmp_path / "run", tmp_path / "out")
    before = sorted((tmp_path / "hub").glob("*.safetensors"))
    after = sorted((tmp_path / "out").glob("*.safetensors"))
    assert sum(p.stat().st_size for p in before) == pytest.approx(sum(p.stat().st_size for p in after), rel=1e-4)
