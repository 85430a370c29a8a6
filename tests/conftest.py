"""Eight fake CPU devices; shapes of every public function are checked on each call."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jaxtyping

jax.config.update("jax_num_cpu_devices", 8)

# dsjax.state holds pytree dataclasses, which tree_map rebuilds with other leaves: it stays outside the hook.
CHECKED = ["dsjax.nn", "dsjax.precision", "dsjax.model", "dsjax.train", "dsjax.infer", "sharding", "pallas_kernels"]
hook = jaxtyping.install_import_hook(CHECKED, "beartype.beartype")
