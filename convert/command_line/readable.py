"""Results of commands as text for people: a line for each value, a table for lists of rows."""

from collections.abc import Mapping, Sequence
from typing import Any


def print_readable(result: Mapping[str, Any]) -> None:
    """Prints a command's result.

    Args:
      result: what --json prints exactly. Here numbers are rounded, and integers whose name
        contains "bytes" are printed in kB, MB, GB or TB.
    """
    for key, value in result.items():
        if isinstance(value, dict):
            items = ", ".join(f"{name} {_text(name, each)}" for name, each in value.items())
            print(f"{key}: {items}")
        elif isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            print(f"{key}:")
            _print_table(value)
        else:
            print(f"{key}: {_text(key, value)}")


def _print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, *([_text(name, row.get(name)) for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  " + "  ".join(cells).rstrip())


def _text(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float) and name == "error":
        return f"{value:.1e}"
    if isinstance(value, int) and not isinstance(value, bool) and "bytes" in name:
        return readable_size(value)
    if isinstance(value, float):
        # Whole numbers with commas, short ones with four digits, huge ones with an exponent.
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.4g}"
    return str(value)


def readable_size(nbytes: float) -> str:
    """A number of bytes in B, kB, MB, GB or TB."""
    units = iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while nbytes >= 1000 and unit != "TB":
        nbytes, unit = nbytes / 1000, next(units)
    return f"{nbytes:.1f} {unit}" if unit != "B" else f"{nbytes} B"
