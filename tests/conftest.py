"""Eight fake CPU devices; shapes of every public function are checked on each call."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is what tests cost: programs that run once need no optimisation.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

import jax
import jaxtyping

jax.config.update("jax_num_cpu_devices", 8)
# Programs of several fake devices that run at once can wait for each other without end.
jax.config.update("jax_cpu_enable_async_dispatch", False)

# dsjax.state holds pytree dataclasses, which tree_map rebuilds with other leaves: it stays outside the hook.
CHECKED = ["dsjax.nn", "dsjax.precision", "dsjax.model", "dsjax.train", "dsjax.infer", "sharding", "pallas_kernels"]
hook = jaxtyping.install_import_hook(CHECKED, "beartype.beartype")
