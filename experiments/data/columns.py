"""Columns of a table: their names, and the format that they imply."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from experiments.data.rows import Rows

Format = Literal["text", "alpaca", "chat", "prompt-completion", "sharegpt", "question-answer"]
FormatChoice = Literal[
    "auto", "text", "alpaca", "chat", "prompt-completion", "sharegpt", "question-answer"
]

_NEEDED: dict[Format, tuple[str, ...]] = {
    "chat": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "question-answer": ("question", "answer"),
}
_OPTIONAL = ("input", "system", "tools")


def read_columns(pairs: Sequence[str]) -> dict[str, str]:
    """Parses pairs such as "prompt=question": our name of a column, and its name in the data.

    Raises:
      ValueError: if a text is not such a pair, or names a column that no format has.
    """
    ours = ("text", *(name for names in _NEEDED.values() for name in names), *_OPTIONAL)
    found: dict[str, str] = {}
    for pair in pairs:
        name, separator, theirs = pair.partition("=")
        if not separator or not theirs or name not in ours or name in found:
            raise ValueError(
                "columns must be pairs such as prompt=question, each of another column among "
                f"{', '.join(ours)}, got {pair!r}."
            )
        found[name] = theirs
    return found


def rename_columns(rows: Rows, columns: dict[str, str]) -> Rows:
    """The same rows under our names.

    Args:
      rows: of a table.
      columns: what `read_columns` returns.

    Raises:
      ValueError: if a column is missing.
    """
    if not columns:
        return rows
    if lacking := [name for name in columns.values() if name not in rows.columns]:
        raise ValueError(
            f"{rows.source} has the columns {_listing(rows.columns)}, but --data.columns names "
            f"{_listing(lacking)}: name existing columns."
        )
    ours: dict[str, list[str]] = {theirs: [] for theirs in columns.values()}
    for name, theirs in columns.items():
        ours[theirs].append(name)
    # A column that has one of our names but is replaced by another one is left out.
    renamed = {name: ours.get(name, [] if name in columns else [name]) for name in rows.columns}
    return dataclasses.replace(
        rows,
        columns=tuple(name for names in renamed.values() for name in names),
        rows=[
            {new: value for old, value in row.items() for new in renamed[old]} for row in rows.rows
        ],
    )


def find_format(rows: Rows, requested: FormatChoice, text_column: str) -> Format:
    """The format of these rows, recognised by their columns if `requested` is "auto".

    A text column beside the columns of another format is ignored: it usually repeats the data.

    Raises:
      ValueError: if columns are missing, or several formats fit.
    """
    needed: dict[Format, tuple[str, ...]] = {**_NEEDED, "text": (text_column,)}
    if requested == "auto" and text_column != "text":
        requested = "text"  # naming the column of plain text chooses the format
    candidates: list[Format] = list(needed) if requested == "auto" else [requested]
    found: list[Format] = [
        each for each in candidates if all(name in rows.columns for name in needed[each])
    ]
    if len(found) > 1 and found[-1] == "text":
        found.pop()
    if len(found) == 1:
        return found[0]
    shown = f"{rows.source} has the columns {_listing(rows.columns)}"
    if found:
        raise ValueError(
            f"{shown}, which fit the formats {' and '.join(found)}: choose with --data.format "
            f"{found[0]}."
        )
    expected = ", or ".join(
        f"{' and '.join(needed[candidate])} (format {candidate})" for candidate in candidates
    )
    raise ValueError(
        f"{shown}; expected {expected}: give their names, as in --data.columns prompt=question "
        "completion=answer."
    )


def _listing(columns: Sequence[str]) -> str:
    """Any names on one line."""
    shown = (name if name.isprintable() and name.strip() else repr(name) for name in columns)
    return ", ".join(shown)
