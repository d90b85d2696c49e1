"""Pushes a finished run to the Hugging Face hub."""

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from convert.errors import ConversionError
from convert.hub import HubTarget, check_access, check_directory, choose_format, push_directory
from convert.pretrained import ExportFormat, check_export
from convert.pushing import check_finished, push_command
from experiments.training.config import HubConfig
from tptt_jax import CausalLM


def check_push(hub: HubConfig, output: Path) -> None:
    """Asks the hub, before anything is computed, whether the run may be pushed.

    Args:
      hub: what is pushed where, if anything.
      output: of the run.

    Raises:
      ConversionError: if not, or if the hub cannot be reached.
    """
    if hub.push_to_hub is not None:
        flags = shlex.join(["python", "-m", "convert", "push", str(output), "ID"])
        check_access(
            _target(hub),
            f"Nothing was trained; without --push-to-hub the run needs no hub, and later {flags} "
            "pushes it.",
        )


def choose_pushed_format(hub: HubConfig, model: CausalLM, source: str) -> ExportFormat | None:
    """Chooses, before training, the format to push, and checks that the run can be exported so.

    Args:
      hub: what is pushed, if anything.
      model: of the run.
      source: of that model, as given with --model.

    Returns:
      None: nothing is pushed.

    Raises:
      ConversionError: if the format cannot express the model.
    """
    if hub.push_to_hub is None:
        return None
    format = choose_format(hub.format, model.liza)
    try:
        check_export(model, format, source)
    except ConversionError as error:
        raise ConversionError(
            f"--push-to-hub would push format {format}, but {error} --push-format has others."
        ) from None
    return format


def push_run(hub: HubConfig, output: Path, format: ExportFormat) -> dict[str, Any]:
    """Exports a finished run to a temporary directory, and pushes that.

    The export is a process of its own, on the CPU: the model that was trained may fill the
    accelerator, or lie on several hosts.

    Args:
      hub: what is pushed where.
      output: of the run.
      format: from `choose_pushed_format`.

    Returns:
      "repository", "commit", "url" and "format".

    Raises:
      ConversionError: if it could not be pushed; the run is complete all the same.
    """
    target = _target(hub)
    check_finished(output)
    again = push_command(output, target, hub.format)
    target = check_access(target, again)
    with tempfile.TemporaryDirectory(prefix="tptt_jax_push_") as folder:
        exported = Path(folder) / target.name.partition("/")[2]
        _export(output, exported, format, again)
        return {"format": format} | push_directory(
            exported, check_directory(exported), target, again
        )


def _target(hub: HubConfig) -> HubTarget:
    assert hub.push_to_hub is not None, "callers ask first"
    return HubTarget(name=hub.push_to_hub, private=hub.private, revision=hub.revision)


def _export(output: Path, exported: Path, format: str, again: str) -> None:
    command = [sys.executable, "-m", "convert", "export", str(output), "--output", str(exported)]
    done = subprocess.run(
        [*command, "--format", format, "--dtype", "auto", "--json"],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        reason = lines[-1].removeprefix("error: ").rstrip(".")
        raise ConversionError(f"the run could not be exported to push it: {reason}. {again}")
