"""The compilation cache, which every command sets up before it computes."""

import os
from pathlib import Path

import jax


def prepare_process() -> None:
    """Keeps compiled programs on disk, so that a second run starts at once.

    JAX_COMPILATION_CACHE_DIR moves the cache; an empty string disables it.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(root / "tptt_jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
