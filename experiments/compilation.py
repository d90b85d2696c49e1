"""The persistent compilation cache: a second run of a command starts at once."""

import os
from pathlib import Path

import jax


def enable_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache directory, unless JAX was told where.

    JAX_COMPILATION_CACHE_DIR moves it; set to an empty string it turns it off.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(root / "tptt_jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
