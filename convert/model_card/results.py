"""Results of `experiments.evaluate`, and their parts of a model card."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from convert.errors import ConversionError
from convert.formats.files import check_regular, read_json
from convert.model_card.markdown import render_command, render_rows, render_table
from convert.model_card.public_text import (
    command_words,
    local_paths,
    name_paths,
    public_command,
)

_RESULTS = "results.json"


class Results(NamedTuple):
    """What an evaluation has found for one model.

    Attributes:
      tasks: reports by task.
      tables: the same as tables of texts by task; empty in older files.
      command: that measured it; empty in older files.
    """

    tasks: Mapping[str, Any]
    tables: Mapping[str, Any]
    command: str

    @classmethod
    def of(cls, content: Mapping[str, Any], label: str) -> "Results":
        """Of one model of a results.json."""
        found = content["models"][label]
        return cls(found["tasks"], found.get("tables", {}), content.get("command", ""))


def load_results(path: Path, label: str) -> Results:
    """Reads the results of `experiments.evaluate` for a model.

    Args:
      path: its results.json.
      label: the model's name in --models or --adapter; ignored for a single model.

    Raises:
      ConversionError: if the file is not a regular one or not evaluate's, or holds other models.
    """
    check_regular(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        labels = [key for key, found in content["models"].items() if "tasks" in found]
    except OSError as error:
        raise ConversionError(
            f"cannot read {path} ({error.strerror}): give the results.json of experiments.evaluate."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConversionError(
            f"{path} is not a results.json of experiments.evaluate: give the file in its --output."
        ) from error
    if len(labels) == len(content["models"]) == 1:
        return Results.of(content, labels[0])
    if label not in labels:
        raise ConversionError(
            f"{path} has results of {', '.join(labels)}, not of {label}: evaluate that model."
        )
    return Results.of(content, label)


def read_results(path: Path, label: str) -> Mapping[str, Any]:
    """The reports by task of `load_results`."""
    return load_results(path, label).tasks


def find_results(run: Path) -> list[Results]:
    """What `experiments.evaluate` has left in a run's directory, or one folder below it.

    Args:
      run: the directory.

    Returns:
      Those of this run, in the order of the folders' names; files that cannot be read and results
      of other models are left out.
    """
    found = []
    for file in sorted([*run.glob(_RESULTS), *run.glob(f"*/{_RESULTS}")]):
        try:
            content = read_json(file)
            own = [label for label in content["models"] if _is_run(label, run)]
            found += [Results.of(content, label) for label in own[:1]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return found


def _is_run(label: str, run: Path) -> bool:
    try:
        return Path(label).expanduser().resolve() == run.resolve()
    except (OSError, RuntimeError, ValueError):
        return False


def render_results(results: Results) -> list[str]:
    """Tables of each task, and the command."""
    if results.tables:
        tables = [each for found in results.tables.values() for each in found]
        known = local_paths(command_words(results.command))
        parts = [render_table(each) for each in name_paths(tables, known)]
    else:
        parts = _of_reports(results.tasks)
    if parts and results.command:
        parts.append(f"Measured by:\n\n{render_command(public_command(results.command))}")
    return parts


def _of_reports(tasks: Mapping[str, Any]) -> list[str]:
    """Tables of perplexity and ablation, of files that have no tables."""
    found = []
    perplexity = tasks.get("perplexity", {})
    if perplexity.get("perplexity"):
        errors = perplexity.get("standard_error", {})
        rows = [
            (column, f"{value:.2f}{_error(errors.get(column), 2)}")
            for column, value in perplexity["perplexity"].items()
        ]
        found += [f"Perplexity of {perplexity['tokens']:,} tokens:"]
        found += [render_rows(("", "perplexity"), rows)]
    without = tasks.get("ablate", {}).get("without")
    if without:
        rows = [_ablation(part, report) for part, report in without.items()]
        columns: Sequence[str] = ("switched off", "perplexity", "costs, nats a token")
        found += ["What each part is worth, one switched off at a time:"]
        found += [render_rows(columns, rows)]
    return found


def _ablation(part: str, report: Mapping[str, Any]) -> tuple[str, str, str]:
    cost = f"{report['cost']:+.3f}{_error(report['error'], 3)}"
    return part, f"{report['perplexity']:.2f}", "" if part == "as it is" else cost


def _error(value: float | None, digits: int) -> str:
    # NaN: too few samples for an error.
    return "" if value is None or value != value else f" ± {value:.{digits}f}"
