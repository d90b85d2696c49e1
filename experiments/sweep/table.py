"""Variants side by side, for a terminal and for a Markdown page."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from experiments.sweep.runner import Outcome
from experiments.training.metrics import folder_metrics

Report = dict[str, Any]

# Last steps of attention transfer over which the gap left is averaged.
_GAP_STEPS = 10


def gap_left(folder: Path) -> float | None:
    """Mean over the layers and the last steps of attention transfer; None: no transfer."""
    records = [record for record in folder_metrics(folder / "transfer") if record.gap_left]
    gaps = [gap for record in records[-_GAP_STEPS:] for gap in record.gap_left or ()]
    return sum(gaps) / len(gaps) if gaps else None


def _number(name: str, form: str) -> Callable[[Report], str]:
    def cell(report: Report) -> str:
        value = report.get(name)
        return "" if value is None else format(value, form)

    return cell


_COLUMNS: dict[str, Callable[[Report], str]] = {
    "full softmax": _number("perplexity_before", ".2f"),
    "window alone": _number("perplexity_window", ".2f"),
    "fitted": _number("perplexity_fitted", ".2f"),
    "recovered, fitted": _number("recovered_gap_fitted", ".2f"),
    "gap left": _number("gap_left", ".3f"),
    "trained": _number("perplexity_after", ".2f"),
    "memory off": _number("perplexity_memory_off", ".2f"),
    "recovered, trained": _number("recovered_gap_after", ".2f"),
}


def table_rows(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """The header and a row for each variant; empty columns are left out."""
    columns = {
        title: [cell(outcome.report or {}) for outcome in outcomes]
        for title, cell in _COLUMNS.items()
    }
    columns = {title: cells for title, cells in columns.items() if any(cells)}
    rows = [["variant", *columns, "seconds"]]
    for i, outcome in enumerate(outcomes):
        seconds = f"{outcome.seconds:.0f}" if outcome.report is not None else "failed"
        rows.append([outcome.name, *(cells[i] for cells in columns.values()), seconds])
    return rows


def rich_table(rows: Sequence[Sequence[str]]) -> Table:
    """The table for a terminal."""
    table = Table(title="Perplexity of held-out text", title_justify="left")
    for i, title in enumerate(rows[0]):
        table.add_column(title, justify="right" if i else "left")
    for row in rows[1:]:
        table.add_row(*map(escape, row))
    return table


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """The table for a Markdown page."""
    lines = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    lines.insert(1, ["---", *(["---:"] * (len(rows[0]) - 1))])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
