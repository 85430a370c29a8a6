"""Eight fake CPU devices; shapes of every public function are checked on each call."""

import gc
import importlib.metadata
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is what tests cost: programs that run once need no optimisation.
FLAGS = " --xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"  # the older emitters compile in half the time; 0.12 has none
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + FLAGS

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
# Programs of several fake devices that run at once can wait for each other without end.
jax.config.update("jax_cpu_enable_async_dispatch", False)

# dsjax.state holds pytree dataclasses, which tree_map rebuilds with other leaves: it stays outside the hook.
CHECKED = ["dsjax.nn", "dsjax.precision", "dsjax.model", "dsjax.train", "dsjax.infer", "sharding", "pallas_kernels"]
hook = jaxtyping.install_import_hook(CHECKED, "beartype.beartype")


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Forgets compiled programs in time: each maps memory a few times, and Linux ends a process at 65,530 mappings."""
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def one_device():
    """A mesh of one device, set for all tests of a module."""
    from sharding.mesh import make_mesh  # after the hook

    with jax.set_mesh(make_mesh(jax.devices()[:1])):
        yield
