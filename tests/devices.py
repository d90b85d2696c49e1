"""Processes that see several CPU devices."""

import os
import subprocess
import sys
from pathlib import Path

# Devices wait for one another in threads of one pool; with too few, none can arrive. And on a busy
# machine some arrive late.
_THREADS = "64"
_PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds=400"


def device_environment(count: int) -> dict[str, str]:
    """The environment of a process that sees so many CPU devices."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count} {_PATIENCE}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "NPROC": _THREADS}


def run_on_devices(count: int, program: str, project_dir: Path) -> str:
    """What a Python program prints that sees so many CPU devices.

    It runs apart, as devices are counted when JAX starts.
    """
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=project_dir,
        env=device_environment(count),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
