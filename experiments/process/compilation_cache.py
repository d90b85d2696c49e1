"""The compilation cache, which every command sets up before it computes."""

import os
import re
import warnings
from pathlib import Path
from typing import Any

import jax

_UNREADABLE = re.compile(r"Error reading persistent compilation cache entry for '(.+?)'")


def prepare_process() -> None:
    """Keeps compiled programs on disk, so that a second run starts at once.

    JAX_COMPILATION_CACHE_DIR moves the cache; an empty string disables it. Damaged entries are
    replaced.
    """
    _replace_damaged_entries()
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(root / "tptt_jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _replace_damaged_entries() -> None:
    """Removes entries that JAX cannot read, in place of its warning.

    JAX compiles such a program again but never replaces an existing file, as one that a killed
    process has left half written, and would warn in every run.
    """
    show: Any = warnings.showwarning
    if getattr(show, "replaces_entries", False):
        return

    def remove_or_show(message: Any, *details: Any, **options: Any) -> None:
        found = _UNREADABLE.match(str(message))
        if found is None or not _remove_entries(found[1]):
            show(message, *details, **options)

    remove_or_show.replaces_entries = True  # type: ignore[attr-defined]
    warnings.showwarning = remove_or_show


def _remove_entries(module: str) -> bool:
    """Removes all entries of a compiled module; whether that was possible.

    The warning does not say which of them is damaged.
    """
    folder = Path(jax.config.jax_compilation_cache_dir or "")  # type: ignore[attr-defined]
    entries = [file for file in folder.glob("*-cache") if file.name.startswith(f"{module}-")]
    try:
        for entry in entries:
            entry.unlink(missing_ok=True)
    except OSError:
        return False
    return bool(entries)
