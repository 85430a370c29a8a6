"""Compiled programs, kept on disk, so that a restart does not compile them again."""

import os
from pathlib import Path

import jax


def keep_programs() -> None:
    """Keeps them in JAX_COMPILATION_CACHE_DIR where that is set, else in ~/.cache/dsjax/programs. A folder that cannot
    be written keeps nothing, and JAX says so."""
    if jax.config.jax_compilation_cache_dir is None:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(base / "dsjax" / "programs"))
