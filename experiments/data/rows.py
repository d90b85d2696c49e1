"""Reads text and rows from Python's own documentation, files and the Hugging Face Hub."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from experiments.data.data_files import PYTHON_DOCS, FoundData, check_split, find_data
from experiments.data.file_rows import FileRows, is_text, read_file
from experiments.data.hub_rows import dataset_rows


class RowRun(NamedTuple):
    """Consecutive rows of a file: their start in `Rows.rows` and in the file."""

    start: int
    source: str
    number: int


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A table, or one long text."""

    source: str
    """Its origin, for messages."""
    columns: tuple[str, ...]
    rows: list[dict[str, Any]]
    is_document: bool = False
    """Whether this is one row with one whole text."""
    runs: tuple[RowRun, ...] = ()
    """Origins of the rows; empty: all from `source`."""

    def place(self, index: int) -> str:
        """Names a row by its file and its number there, counted from 1."""
        found = bisect_right([run.start for run in self.runs], index)
        if not found:
            return f"{self.source}, row {index + 1}"
        start, source, number = self.runs[found - 1]
        return f"{source}, row {index - start + number}"


def load_rows(
    path: str | Sequence[str],
    split: str = "train",
    max_rows: int | None = None,
    revision: str | None = None,
    *,
    files: FoundData | None = None,
) -> Rows:
    """Reads the rows of a data source.

    Args:
      path: "python-docs", a JSON Lines, JSON, CSV, TSV, Parquet or text file, a folder, a pattern
        such as "parts/*.jsonl", several of these files, or a dataset id on the Hugging Face
        Hub. All but Parquet may be compressed: .gz, .zst.
      split: split of a Hub dataset or a folder; slices such as "train[:10%]" work for tables only.
      max_rows: most rows to read; None: all.
      revision: branch, tag or commit of a Hub dataset.
      files: what `find_data` has found; None: it is called.

    Returns:
      At least one row.

    Raises:
      FileNotFoundError: if there is no such file, folder or dataset.
      ValueError: if it is empty or cannot be read; the message names the line if possible.
    """
    found = files or find_data(path, split, revision)
    shown = found.shown
    if found.paths == (PYTHON_DOCS,):
        return _document(shown, split, python_docs_text())
    if found.files is not None:
        rows = _load_files(found, found.files, split, max_rows)
    else:
        options = {"revision": revision} if found.is_hub else {}
        name = shown if found.is_hub else str(Path(shown).expanduser())
        columns, table = dataset_rows(name, split, max_rows, shown=name, **options)
        rows = Rows(source=shown, columns=columns, rows=table)
    if not rows.rows:
        raise ValueError(f"{shown} has no rows in split {split!r}: nothing to read.")
    return rows


def is_text_file(path: str | Sequence[str]) -> bool:
    """Whether `path` is a file that holds one text, not a table."""
    if not isinstance(path, str):
        return False
    file = Path(path).expanduser()
    return file.is_file() and is_text(file)


def is_whole_text(path: str | Sequence[str]) -> bool:
    """Whether data is one text, whose beginning is held out, not a table."""
    return path == PYTHON_DOCS or is_text_file(path)


def python_docs_text() -> str:
    """The demo text: all topics of `pydoc_data`, sorted, joined by a blank line."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _document(source: str, split: str, text: str) -> Rows:
    if split != "train":
        raise ValueError(
            f"{source} is one text and has no rows to slice (--data.split {split}): lower "
            "--data.eval-tokens or cut the file."
        )
    return Rows(source=source, columns=("text",), rows=[{"text": text}], is_document=True)


def _load_files(
    data: FoundData, found: dict[str, list[Path]], split: str, max_rows: int | None
) -> Rows:
    """Files one after the other."""
    most = max_rows if split in found else None
    read = {name: _read_files(files, most) for name, files in found.items()}
    files = [each for name in read for each in read[name]]
    kinds = {is_text(file) for file, _ in files}
    if len(kinds) > 1:
        raise ValueError(f"{data.shown} names texts and tables: use a separate run for each kind.")
    if len(files) == 1 and kinds == {True} and files[0][1].rows:
        return _document(str(files[0][0]), split, files[0][1].rows[0]["text"])
    is_file = len(files) == 1 and not data.is_hub
    return _join(str(files[0][0]) if is_file else data.shown, split, max_rows, read)


def _read_files(files: list[Path], most: int | None) -> list[tuple[Path, FileRows]]:
    found: list[tuple[Path, FileRows]] = []
    for file in files:
        left = None if most is None else most - sum(len(each.rows) for _, each in found)
        if left == 0:
            break
        found.append((file, read_file(file, left)))
    return found


def _join(
    source: str, split: str, max_rows: int | None, read: dict[str, list[tuple[Path, FileRows]]]
) -> Rows:
    """The rows of all files in the split, and their origins."""
    lengths = {name: sum(len(each.rows) for _, each in files) for name, files in read.items()}
    rows: list[dict[str, Any]] = []
    runs: list[RowRun] = []
    columns: dict[str, None] = {}
    for name, first, end in check_split(source, split, lengths):
        start = 0
        for file, (names, found) in read[name]:
            low, high = max(first - start, 0), min(end - start, len(found))
            if low < high:
                runs.append(RowRun(len(rows), str(file), low + 1))
                rows += found[low:high]
                columns |= dict.fromkeys(names)
            start += len(found)
    return Rows(source=source, columns=tuple(columns), rows=rows[:max_rows], runs=tuple(runs))
