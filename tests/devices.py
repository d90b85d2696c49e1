"""Processes that see several CPU devices."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def measured_on_devices(count: int, module: str, path: Path, project_dir: Path) -> Any:
    """What `write(path)` of a test module has written as JSON where it sees so many CPU devices."""
    run_on_devices(count, f"from {module} import write; write({str(path)!r})", project_dir)
    return json.loads(path.read_text())


def start_processes(count: int, arguments: Sequence[object]) -> list["subprocess.Popen[str]"]:
    """Starts a command in several processes that find one another on this machine.

    Args:
      count: processes; each sees one CPU device.
      arguments: after the interpreter's name; those of --distributed are added.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{found.getsockname()[1]}"
    group = ["--distributed", "--distributed.coordinator", address]
    group += ["--distributed.processes", str(count), "--distributed.process"]
    return [
        subprocess.Popen(
            [sys.executable, *map(str, arguments), *group, str(process)],
            cwd=Path(__file__).resolve().parents[1],
            env=device_environment(1),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(count)
    ]
