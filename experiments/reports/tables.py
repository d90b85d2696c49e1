"""Tables of rich as plain texts."""

from typing import Any

from rich.console import Console
from rich.table import Table


def plain_text(cell: object) -> str:
    """A cell, a header or a title of a table without markup."""
    console = Console(width=10_000, color_system=None, force_terminal=False, quiet=False)
    with console.capture() as captured:
        console.print(cell, end="")
    return captured.get()


def table_texts(table: Table) -> dict[str, Any]:
    """A table as JSON: "title", "columns" and "rows" of texts."""
    rows = zip(*(column.cells for column in table.columns), strict=True)
    return {
        "title": plain_text(table.title or ""),
        "columns": [plain_text(column.header) for column in table.columns],
        "rows": [[plain_text(cell) for cell in row] for row in rows],
    }
