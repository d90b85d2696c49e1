"""summary.json of a finished run, and its parts of a model card."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from convert.errors import ConversionError
from convert.model_card.markdown import render_command, render_rows, render_table
from convert.model_card.public_text import (
    local_paths,
    name_paths,
    public_command,
    public_text,
    public_value,
)
from convert.model_card.results import find_results, render_results

SUMMARY = "summary.json"
SUMMARY_FORMAT = "tptt_jax summary 1"
"""Of a summary.json: a JSON object with this as "format", and the fields of `RunSummary`."""
# Folder of the best weights, below a run's; it has no summary of its own.
_BEST = "best"
# Of this machine or this call, not of the recipe.
_PRIVATE = (
    "output",
    "config",
    "distributed",
    "trackers",
    "resume",
    "resume_allow",
    "dry_run",
    "hub",
)


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What a finished run says of itself."""

    step: int
    """The last step of training."""
    command: str
    """How to run it again."""
    recipe: dict[str, str | list[str]]
    """Label and value of each setting that readers look for."""
    settings: dict[str, Any]
    """The whole configuration, in blocks as config.yaml has it."""
    datasets: list[str] = field(default_factory=list)
    """Ids of data sets on the hub."""
    measured: list[dict[str, Any]] = field(default_factory=list)
    """Tables: "title", "columns" and "rows" of texts."""
    worth: str = ""
    """What the memory is worth, in one line."""


def read_summary(run: Path) -> RunSummary | None:
    """Reads the summary of a run, or of the run that a folder of best weights lies in.

    Args:
      run: a run's directory.

    Returns:
      None if the run has not finished, or an older version wrote it.

    Raises:
      ConversionError: if the file is damaged.
    """
    file = run / SUMMARY
    if not file.is_file() and run.resolve().name == _BEST:
        file = run.resolve().parent / SUMMARY
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values.pop("format") != SUMMARY_FORMAT:
            raise ValueError(f'its "format" is not {SUMMARY_FORMAT!r}')
        return RunSummary(**values)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ConversionError(
            f"{file} is damaged ({error}): remove it, and give the run's command again to write it."
        ) from None


def summary_of(run: Path) -> tuple[int | None, RunSummary | None]:
    """The step of a run's last sound checkpoint, and the summary that belongs to it.

    Args:
      run: a run's directory, or its folder of best weights.

    Returns:
      The summary is None if the run has not finished, or was resumed after it had.
    """
    # Importing orbax takes a quarter of a second.
    from tptt_jax.training.checkpoint import latest_sound_step

    step, summary = latest_sound_step(run), read_summary(run)
    last = step if (run / SUMMARY).is_file() else latest_sound_step(run.resolve().parent)
    return step, summary if summary is not None and summary.step == last else None


def recipe_parts(summary: RunSummary, step: int | None) -> list[str]:
    """The recipe of a run: a table, and the whole configuration.

    Args:
      summary: of the run.
      step: of the weights that are exported.
    """
    rows = [("step of these weights", f"{step} of {summary.step}")] if step != summary.step else []
    for label, value in summary.recipe.items():
        values = value if isinstance(value, list) else [value]
        rows.append((label, ", ".join(map(public_value, values))))
    settings = {key: each for key, each in summary.settings.items() if key not in _PRIVATE}
    text = yaml.safe_dump(public_value(settings), sort_keys=False, allow_unicode=True)
    return [
        render_rows(("", ""), rows),
        "The same run again, with the configuration below as `config.yaml`, where paths of this "
        "machine are names only:",
        render_command(public_command(summary.command)),
        f"<details><summary>Configuration</summary>\n\n```yaml\n{text}```\n\n</details>",
    ]


def measured_parts(summary: RunSummary, run: Path, step: int | None) -> list[str]:
    """Every evaluation of a run with its command.

    Args:
      summary: of the run.
      run: its directory, for results that `experiments.evaluate` left there.
      step: of the weights that are exported.
    """
    parts = []
    if step != summary.step and summary.measured:
        parts.append(
            f"The run measured itself after its last step, {summary.step}; these are the weights "
            f"of step {step}, where the held-out loss was lowest."
        )
    if summary.worth:
        parts.append(f"**{public_text(summary.worth)}.**")
    parts += map(render_table, name_paths(summary.measured, local_paths(summary.settings)))
    if summary.measured:
        command = render_command(public_command(summary.command))
        parts.append(f"Measured by the run itself:\n\n{command}")
    return parts + [part for found in find_results(run) for part in render_results(found)]
