"""What every command does to its process before it computes anything."""

import ctypes
import os
from pathlib import Path

import jax

_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def prepare_process() -> None:
    """Keeps compiled programs on disk, and freed memory in the process."""
    _enable_compilation_cache()
    _keep_freed_memory()


def _enable_compilation_cache() -> None:
    """A second run starts at once.

    JAX_COMPILATION_CACHE_DIR moves the cache; set to an empty string it turns it off.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(root / "tptt_jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def _keep_freed_memory() -> None:
    """Has glibc reuse large blocks instead of returning them to the system.

    XLA on CPU allocates the temporaries of every step anew; with the default settings the
    kernel then clears each page of them again, which took a quarter of a training step.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    except (OSError, AttributeError):
        return  # another libc: nothing is lost but speed
