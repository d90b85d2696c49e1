"""Properties of the GPU."""

import re

import jax


def compute_capability() -> tuple[int, int] | None:
    """Compute capability of the first NVIDIA GPU, e.g. (9, 0) for Hopper; None without one."""
    if jax.default_backend() != "gpu":
        return None
    # Such as 9.0; AMD's have names such as gfx90a.
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    match = re.fullmatch(r"(\d+)\.(\d+)", capability)
    return None if match is None else (int(match[1]), int(match[2]))
