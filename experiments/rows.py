"""Reading text and rows from Python's own documentation, files and the Hugging Face Hub."""

import csv
import glob
import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PYTHON_DOCS = "python-docs"
"""Names the demo text, the Python language reference that comes with every CPython."""

_BUILDERS = {
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
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A table, or one long text."""

    source: str
    """Where it comes from, for messages."""
    columns: tuple[str, ...]
    rows: list[dict[str, Any]]
    is_document: bool = False
    """One row with one text that is read from its beginning to its end."""


def load_rows(path: str, split: str = "train", max_rows: int | None = None) -> Rows:
    """Reads the data that `path` names.

    Args:
      path: "python-docs", a JSON Lines, JSON, CSV, TSV, Parquet or text file, a folder that
        `datasets.load_dataset` understands, or a dataset id on the Hugging Face Hub.
      split: split of a Hub dataset or a folder; slices such as "train[:10%]" work everywhere.
      max_rows: reads only so many rows.

    Returns:
      At least one row.

    Raises:
      FileNotFoundError: if there is no such file, folder or dataset.
      ValueError: if it cannot be read, naming the line if there is one, or is empty.
    """
    if path == PYTHON_DOCS:
        return _document(path, python_docs_text())
    file = Path(path).expanduser()
    if file.is_file():
        rows = _load_file(file, split, max_rows)
    elif file.is_dir():
        with tempfile.TemporaryDirectory() as cache:
            rows = _load_dataset(str(file), split, max_rows, cache_dir=cache)
    elif file.suffix.lower() in _BUILDERS or not _HUB_ID.fullmatch(path):
        raise FileNotFoundError(f"There is no file {path}: check the path given as data.")
    else:
        rows = _load_dataset(path, split, max_rows)
    if not rows.rows:
        raise ValueError(f"{path} has no rows in split {split!r}: nothing to read.")
    return rows


def is_text_file(path: str) -> bool:
    """Whether `path` is a file that holds one text, not a table."""
    file = Path(path).expanduser()
    return file.is_file() and _BUILDERS.get(file.suffix.lower(), "text") == "text"


def python_docs_text() -> str:
    """The demo text: all topics of `pydoc_data`, sorted, joined by a blank line."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _document(source: str, text: str) -> Rows:
    return Rows(source=source, columns=("text",), rows=[{"text": text}], is_document=True)


def _load_file(file: Path, split: str, max_rows: int | None) -> Rows:
    suffix = file.suffix.lower()
    builder = _BUILDERS.get(suffix)
    if builder is None:
        raise ValueError(
            f"{file} has the unknown extension {suffix!r}: use one of {', '.join(_BUILDERS)}."
        )
    if file.stat().st_size == 0:
        raise ValueError(f"{file} is empty: nothing to read.")
    options: dict[str, Any] = {}
    try:
        if builder == "json":
            return _load_json(file, split, max_rows, lines=suffix != ".json")
        if builder == "csv":
            options = _csv_options(file, "\t" if suffix == ".tsv" else ",")
        elif builder == "text":
            options = {"sample_by": "document"}
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason}): convert it.") from None
    # A path is a pattern to `datasets`: without the escape "a[1].jsonl" would not be found.
    data_files = {"train": glob.escape(str(file.absolute()))}
    with tempfile.TemporaryDirectory() as cache:
        rows = _load_dataset(
            builder, split, max_rows, source=file, data_files=data_files, cache_dir=cache, **options
        )
    if builder == "text" and rows.rows:
        return _document(rows.source, rows.rows[0]["text"])
    return rows


def _load_dataset(
    name: str, split: str, max_rows: int | None, *, source: Path | None = None, **options: Any
) -> Rows:
    shown = str(source or name)
    import datasets  # takes seconds to import, and the demo text needs none of it
    from datasets.exceptions import DatasetNotFoundError

    try:
        with _quiet_datasets():
            table = datasets.load_dataset(name, split=split, **options)
            if max_rows is not None:
                table = table.select(range(min(max_rows, len(table))))
            rows = [_without_nulls(row) for row in table.to_list()]
            return Rows(source=shown, columns=tuple(table.column_names), rows=rows)
    except (DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{shown} is neither a file here nor a dataset that the Hugging Face Hub gives "
            f"({_first_line(error)})."
        ) from error
    # The builders let pass whatever pandas, pyarrow and they themselves raise, StopIteration too.
    except Exception as error:
        raise ValueError(f"Cannot read {shown} as a dataset: {_first_line(error)}") from error


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """A row of Arrow's without the keys that only nested objects of other rows have."""

    def own(value: Any) -> Any:
        if isinstance(value, list):
            return [own(item) for item in value]
        if isinstance(value, dict):
            return {key: own(item) for key, item in value.items() if item is not None}
        return value

    return {key: own(value) for key, value in row.items()}


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """No progress bars and no log lines beside our own errors."""
    import datasets

    verbosity = datasets.logging.get_verbosity()
    had_bars = not datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if had_bars:
            datasets.enable_progress_bars()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _load_json(file: Path, split: str, max_rows: int | None, *, lines: bool) -> Rows:
    """Rows as they are written: Arrow would make dates of texts and give all rows the same keys."""
    rows: list[dict[str, Any]] = []
    most = max_rows if split == "train" else None
    for row in _json_rows(file, lines=lines):
        rows.append(row)
        if len(rows) == most:
            break
    chosen = _split_of(file, rows, split)[:max_rows]
    columns = dict.fromkeys(key for row in chosen for key in row)
    return Rows(source=str(file), columns=tuple(columns), rows=chosen)


def _split_of(file: Path, rows: list[dict[str, Any]], split: str) -> list[dict[str, Any]]:
    """The slices of the only split, "train", that an expression such as "train[:10%]" names."""
    if split == "train":
        return rows
    import datasets

    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({"train": len(rows)})
    except (ValueError, AssertionError) as error:
        raise ValueError(f"Cannot read {file} as a dataset: {_first_line(error)}") from error
    return [row for part in parts for row in rows[part.from_ : part.to]]


def _json_rows(file: Path, *, lines: bool) -> Iterator[dict[str, Any]]:
    """The objects of a JSON or JSON Lines file; a fault is named by its line."""
    if not lines:
        try:
            content = json.loads(file.read_text(encoding="utf-8-sig"))
        except json.JSONDecodeError as error:
            # JSON Lines are often called .json.
            if error.msg != "Extra data":
                raise ValueError(
                    f"{file}, line {error.lineno}, is not valid JSON ({error.msg}): repair it."
                ) from None
        except RecursionError:
            raise ValueError(f"{file} is nested too deeply: repair it.") from None
        else:
            rows = content if isinstance(content, list) else [content]
            for number, row in enumerate(rows, start=1):
                yield _object(row, f"{file}, element {number},")
            return
    with file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            place = f"{file}, line {number},"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{place} is not valid JSON ({error.msg}): repair or remove the line."
                ) from None
            except RecursionError:
                raise ValueError(f"{place} is nested too deeply: remove the line.") from None
            yield _object(row, place)


def _object(row: Any, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{place} must be a JSON object, got {type(row).__name__}.")
    return row


def _csv_options(file: Path, delimiter: str) -> dict[str, Any]:
    """Keeps every cell a string ("NA" and "007" too) and refuses rows that were cut off."""
    import datasets

    csv.field_size_limit(2**31 - 1)  # the default refuses cells of 128 KiB, a long text
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, delimiter=delimiter)
        header = next(reader, [])
        for row in reader:
            if row and len(row) != len(header):
                raise ValueError(
                    f"{file}, line {reader.line_num}, has {len(row)} cells where the header has "
                    f"{len(header)}: repair or remove the line."
                )
    features = datasets.Features({name: datasets.Value("string") for name in header})
    return {"sep": delimiter, "features": features, "keep_default_na": False}
