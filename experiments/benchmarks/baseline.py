"""Reads results of earlier runs, checks them, and compares with them."""

import json
from pathlib import Path
from typing import Any

from convert.formats.files import check_regular

_FORM = "the result of an earlier run, from --output or --json"
_MEASURED = ("median_s", "first_run_s", "peak_gb")


def read_baseline(path: Path, bench: str, workload: dict[str, Any]) -> dict[str, Any]:
    """Reads an earlier result for the same workload.

    Args:
      path: its file.
      bench: the subcommand that must have written it.
      workload: the workload that it must have measured.

    Raises:
      ValueError: if the file holds something else.
      OSError: if it cannot be read.
    """
    check_regular(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must hold {_FORM}: {error}.") from None
    if not _is_result(found):
        raise ValueError(f"{path} must hold {_FORM}, as JSON with {', '.join(_MEASURED)}.")
    if found["bench"] != bench:
        raise ValueError(f"{path} was measured by bench {found['bench']}, not by bench {bench}.")
    # As JSON holds it: a tuple becomes a list.
    now, then = json.loads(json.dumps(workload)), found["workload"]
    differing = [
        f"{name}: {then.get(name)} in the file, {now.get(name)} now"
        for name in dict.fromkeys((*now, *then))
        if then.get(name) != now.get(name)
    ]
    if differing:
        raise ValueError(f"{path} measured another workload: {', '.join(differing)}.")
    return found


def _is_result(found: Any) -> bool:
    if not isinstance(found, dict) or not isinstance(found.get("workload"), dict):
        return False
    numbers = [found.get(name) for name in _MEASURED]
    return isinstance(found.get("bench"), str) and all(
        isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < float("inf")
        for x in numbers
    )


def compare(now: dict[str, Any], baseline: dict[str, Any], path: Path) -> dict[str, Any]:
    """Compares a result with its baseline; every ratio above 1 is an improvement.

    Returns:
      `speedup` and `first_run_speedup`, baseline seconds per second now; `memory_saving`, the
      baseline's peak per peak now; a description of the baseline, and whether it was measured on
      another device or by another program.
    """
    program = now.get("implementation")
    speedup, first_run_speedup, memory_saving = (baseline[x] / now[x] for x in _MEASURED)
    return {
        "baseline": str(path),
        "baseline_date": baseline.get("date"),
        "baseline_jax": baseline.get("jax"),
        "baseline_device": baseline.get("device"),
        "device_differs": baseline.get("device") != now["device"],
        "implementation_differs": baseline.get("implementation", program) != program,
        "speedup": speedup,
        "first_run_speedup": first_run_speedup,
        "memory_saving": memory_saving,
    }
