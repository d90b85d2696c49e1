"""Tables of Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from convert.model_card.public_text import public_text


def render_rows(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table; cells hold public text in one line."""
    lines = [f"| {' | '.join(map(_cell, columns))} |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *(f"| {' | '.join(map(_cell, row))} |" for row in rows)])


def render_table(table: Mapping[str, Any]) -> str:
    """A table of "title", "columns" and "rows" of texts, with its title above."""
    title = public_text(str(table.get("title", "")))
    return f"{title}\n\n{render_rows(table['columns'], table['rows'])}".strip()


def render_command(command: str) -> str:
    """A shell command as a block."""
    return f"```\n{command}\n```"


def _cell(value: Any) -> str:
    return " ".join(public_text(str(value)).split()).replace("|", "\\|")
