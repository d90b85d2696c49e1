"""Rows of one JSON Lines, JSON, CSV, TSV, Parquet or text file, each with its own keys."""

import csv
import glob
import json
import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from experiments.data.hub_rows import dataset_rows, parquet_rows
from experiments.data.text_files import COMPRESSIONS, open_text, text_blocks, text_suffix

_KINDS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
}


class FileRows(NamedTuple):
    """The content of one file.

    Attributes:
      columns: their names, in order.
      rows: each with its own keys only.
    """

    columns: tuple[str, ...]
    rows: list[dict[str, Any]]


def kind_of(file: Path) -> str | None:
    """The kind by extension: json, csv, parquet or text; None: unknown."""
    kind = _KINDS.get(text_suffix(file))
    return None if kind == "parquet" and file.suffix.lower() in COMPRESSIONS else kind


def is_text(file: Path) -> bool:
    """Whether a file is read as one text: by its extension, or because that is unknown."""
    return kind_of(file) in ("text", None)


def read_file(file: Path, most: int | None = None) -> FileRows:
    """Reads the rows of a file.

    Args:
      file: not a special file.
      most: most rows to read.

    Raises:
      ValueError: if it cannot be read, naming the line if there is one.
    """
    if text_suffix(file) == ".parquet" and kind_of(file) is None:
        raise ValueError(
            f"{file} is a compressed Parquet file: of {', '.join(_KINDS)} all but .parquet may end "
            "in .gz or .zst. Unpack it."
        )
    kind = "text" if is_text(file) else kind_of(file)
    if file.stat().st_size == 0:
        raise ValueError(f"{file} is empty: nothing to read.")
    if kind == "text":
        with open_text(file) as stream:
            return FileRows(("text",), [{"text": _checked(stream.read(), file)}])
    if kind == "parquet":
        # A path is a pattern to `datasets`: without the escape "a[1].parquet" is not found.
        data_files = {"train": glob.escape(str(file.absolute()))}
        with tempfile.TemporaryDirectory() as cache:
            return FileRows(
                *dataset_rows(
                    "parquet", "train", most, shown=file, data_files=data_files, cache_dir=cache
                )
            )
    if kind == "csv":
        header, cells = _csv_rows(file, "\t" if text_suffix(file) == ".tsv" else ",")
        return FileRows(header, list(islice(cells, most)))
    rows = list(islice(_json_rows(file, lines=text_suffix(file) != ".json"), most))
    return FileRows(tuple(dict.fromkeys(key for row in rows for key in row)), rows)


def iterate_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file one by one, in constant memory; a text becomes rows of about 64 kB.

    Only a .json file that is one array is read as a whole.

    Raises:
      ValueError: if it cannot be read, naming the line if there is one.
    """
    kind = "text" if is_text(file) else kind_of(file)
    if kind == "text":
        with open_text(file) as stream:
            for block in text_blocks(stream):
                yield {"text": _checked(block, file)}
    elif kind == "parquet":
        yield from parquet_rows(file)
    elif kind == "csv":
        yield from _csv_rows(file, "\t" if text_suffix(file) == ".tsv" else ",")[1]
    else:
        yield from _json_rows(file, lines=text_suffix(file) != ".json")


def _checked(text: str, file: Path) -> str:
    """The text itself; raises ValueError for that of an archive, as .tar.gz when unpacked."""
    if (place := text.find("\0")) < 0:
        return text
    line = text.count("\n", 0, place) + 1
    raise ValueError(
        f"{file}, line {line}, holds a zero byte, which text does not: unpack archives, and give "
        f"text or one of {', '.join(_KINDS)}."
    )


def _json_rows(file: Path, *, lines: bool) -> Iterator[dict[str, Any]]:
    """The objects of a JSON or JSON Lines file; errors name the line.

    Arrow would turn texts into dates and give all rows the same keys.
    """
    if not lines:
        with open_text(file) as stream:
            text = stream.read()
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            # JSON Lines files are often named .json.
            if error.msg != "Extra data":
                place = f"{file}, line {error.lineno},"
                raise _json_fault(error, place, "repair it") from None
        except (RecursionError, ValueError) as error:
            raise _json_fault(error, str(file), "repair it") from None
        else:
            rows = content if isinstance(content, list) else [content]
            for number, row in enumerate(rows, start=1):
                yield _object(row, f"{file}, element {number},")
            return
    with open_text(file) as stream:
        yield from _json_lines(file, stream)


def _json_lines(file: Path, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        yield parsed_line(line, f"{file}, line {number},")


def parsed_line(line: str, place: str) -> dict[str, Any]:
    """The object in one line of JSON.

    Raises:
      ValueError: if there is none; the message begins with `place`.
    """
    try:
        row = json.loads(line)
    except (RecursionError, ValueError) as error:
        raise _json_fault(error, place, "repair or remove the line") from None
    return _object(row, place)


def _json_fault(error: Exception, place: str, remedy: str) -> ValueError:
    """The error of `json.loads` in one line."""
    if isinstance(error, json.JSONDecodeError):
        what = f"is not valid JSON ({error.msg})"
    elif isinstance(error, RecursionError):
        what = "is nested too deeply"
    else:  # Python's limit for integers
        what = "holds a number of over 4,300 digits"
    return ValueError(f"{place} {what}: {remedy}.")


def _object(row: Any, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{place} must be a JSON object, got {type(row).__name__}.")
    return row


def _csv_rows(file: Path, delimiter: str) -> tuple[tuple[str, ...], Iterator[dict[str, str]]]:
    """The header, and rows in which every cell is text ("NA" and "007" too)."""
    lines = _csv_lines(file, delimiter)
    header = next((cells for _, cells in lines if any(map(str.strip, cells))), [])
    # Spreadsheets append empty columns.
    count = len(header)
    while count and not header[count - 1].strip():
        count -= 1
    count = len(header) if len(header) - count < 2 else count
    names = header[:count]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        shown = ", ".join(map(repr, repeated))
        raise ValueError(f"{file} has several columns named {shown}: give each its own name.")

    def rows() -> Iterator[dict[str, str]]:
        for number, cells in lines:
            if cells and len(cells) != len(header):
                raise ValueError(
                    f"{file}, line {number}, has {len(cells)} cells where the header has "
                    f"{len(header)}: repair or remove the line."
                )
            if any(cells[count:]):
                raise ValueError(
                    f"{file}, line {number}, has a value in a column without a name: name the "
                    "column in the header, or remove it."
                )
            if cells:
                yield dict(zip(names, cells[:count], strict=True))

    return tuple(names), rows()


def _csv_lines(file: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Cells, and the number of the line where they end."""
    csv.field_size_limit(2**31 - 1)  # the default refuses cells of 128 KiB, a long text
    with open_text(file, newline="") as stream:
        # If not strict, the reader would drop quotes in the middle of a cell.
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        try:
            for cells in reader:
                yield reader.line_num, cells
        except csv.Error as error:
            raise ValueError(
                f"{file}, line {reader.line_num}, is not valid CSV ({error}): put quotes around "
                "the whole cell and double those inside."
            ) from None
