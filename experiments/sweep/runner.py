"""Runs each variant in its own process, so that a crash does not end the others."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from experiments.process.interrupts import StopRequest
from experiments.sweep.plan import Variant, leaves
from tptt_jax.durable import atomic_file

_FINETUNE = "experiments.finetune"
_INTERRUPTED = 130
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Outcome:
    """The result of a variant."""

    name: str
    report: dict[str, Any] | None
    """The --json report of finetune; None: it failed."""
    seconds: float
    error: str = ""
    is_new: bool = True
    """Whether this call ran it."""


def check_folders(output: Path, variants: list[Variant]) -> None:
    """Raises ValueError if a variant's directory holds a run with other settings."""
    for variant in variants:
        file = output / variant.folder / "variant.yaml"
        differences = _differences(file, variant) if file.is_file() else ""
        if differences:
            raise ValueError(
                f"{file.parent} holds another run ({differences}): use another --output, rename "
                f"the variant {variant.name!r}, or remove the directory."
            )


def _differences(file: Path, variant: Variant) -> str:
    """Settings that differ between an earlier variant's file and a variant."""
    try:
        old = dict(leaves(yaml.safe_load(file.read_text(encoding="utf-8"))))
    except (yaml.YAMLError, AttributeError):
        return f"{file.name} is damaged"
    new = dict(leaves(variant.settings))
    pairs = {name: (old.get(name, "default"), new.get(name, "default")) for name in old | new}
    return "; ".join(f"{name}: {a} in the run, {b} now" for name, (a, b) in pairs.items() if a != b)


def run_variant(output: Path, variant: Variant) -> Outcome:
    """Runs or resumes a variant, or returns the result of an earlier call.

    Ctrl-C is passed on to finetune, which leaves a checkpoint.

    Raises:
      KeyboardInterrupt: if the run was interrupted.
    """
    folder = output / variant.folder
    known = _read(folder / "result.json")
    if known is not None:
        return Outcome(variant.name, known["report"], known["seconds"], is_new=False)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / "variant.yaml") as path:
        path.write_text(_yaml(variant), encoding="utf-8")
    begin = time.perf_counter()
    status = _run(folder)
    seconds = time.perf_counter() - begin
    if status:
        return Outcome(variant.name, None, seconds, _last_line(folder / "stderr.txt", status))
    report = json.loads((folder / "stdout.txt").read_text(encoding="utf-8").splitlines()[-1])
    if "terminated" in report:
        raise KeyboardInterrupt  # whoever ends one run by SIGTERM ends all of them
    with atomic_file(folder / "result.json") as path:
        path.write_text(json.dumps({"report": report, "seconds": seconds}, indent=2) + "\n")
    return Outcome(variant.name, report, seconds)


def _run(folder: Path) -> int:
    """Runs finetune with its output in two files; returns the exit status."""
    flags = ["-P"] if sys.flags.safe_path else []
    command = [sys.executable, *flags, "-m", _FINETUNE, "--config", str(folder / "variant.yaml")]
    command += ["--output", str(folder), "--json"]
    stop = StopRequest()
    with (
        (folder / "stdout.txt").open("wb") as stdout,
        (folder / "stderr.txt").open("wb") as stderr,
        stop,
        # Otherwise finetune would receive a terminal's Ctrl-C twice, and end at once.
        subprocess.Popen(command, stdout=stdout, stderr=stderr, start_new_session=True) as process,
    ):
        try:
            is_told = False
            while process.poll() is None:
                if stop.requested and not is_told:
                    process.send_signal(signal.SIGINT)
                    is_told = True
                time.sleep(_POLL_SECONDS)
        finally:
            process.kill()
    if process.returncode == _INTERRUPTED or stop.requested:
        raise KeyboardInterrupt
    return process.returncode


def _yaml(variant: Variant) -> str:
    return yaml.safe_dump(variant.settings, sort_keys=False, allow_unicode=True)


def _read(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _last_line(file: Path, status: int) -> str:
    lines = file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else f"exit status {status}"
