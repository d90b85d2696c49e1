"""Memory in use: the accelerator's, or on a CPU the process's."""

import resource
from pathlib import Path

import jax


def resident_gb() -> float:
    """Memory in use now, in GB of 1e9 bytes: the device's arrays, on a CPU the resident memory."""
    if (stats := jax.devices()[0].memory_stats()) is not None:
        return stats["bytes_in_use"] / 1e9
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e9


def peak_gb() -> float:
    """Peak memory since the process started, in GB of 1e9 bytes."""
    if (stats := jax.devices()[0].memory_stats()) is not None:
        return stats["peak_bytes_in_use"] / 1e9
    return host_peak_gb()


def host_peak_gb() -> float:
    """Peak resident memory of the process, in GB of 1e9 bytes.

    From its own status: the value of getrusage is inherited from the parent process.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
