"""Reads text and rows from Python's own documentation, files and the Hugging Face Hub."""

import glob
import re
import tempfile
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from experiments.data.file_rows import FileRows, is_text, kind_of, read_file
from experiments.data.hub_rows import dataset_rows, first_line, folder_files, slice_splits

PYTHON_DOCS = "python-docs"
"""Names the demo text, the Python language reference that comes with every CPython."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SPLIT_NAMES = re.compile(r"(?:^|\+)\s*([^\[\]+\s]+)")


class _Run(NamedTuple):
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
    runs: tuple[_Run, ...] = ()
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
    leave_out: Path | None = None,
) -> Rows:
    """Reads the rows of a data source.

    Args:
      path: "python-docs", a JSON Lines, JSON, CSV, TSV, Parquet or text file, a folder, a pattern
        such as "parts/*.jsonl", several of these files, or a dataset id on the Hugging Face
        Hub. All but Parquet may be compressed: .gz, .zst.
      split: split of a Hub dataset or a folder; slices such as "train[:10%]" work for tables only.
      max_rows: most rows to read; None: all.
      revision: branch, tag or commit of a Hub dataset.
      leave_out: a folder whose files are not data, such as the run's own.

    Returns:
      At least one row.

    Raises:
      FileNotFoundError: if there is no such file, folder or dataset.
      ValueError: if it is empty or cannot be read; the message names the line if possible.
    """
    paths = [path] if isinstance(path, str) else list(path)
    shown = " ".join(paths)
    is_hub = len(paths) == 1 and is_hub_id(paths[0])
    if revision is not None and not is_hub:
        raise ValueError(
            f"--data.revision {revision} is for datasets on the Hugging Face Hub, but {shown} is "
            "local: leave it out."
        )
    if paths == [PYTHON_DOCS]:
        return _document(shown, split, python_docs_text())
    if is_hub:
        columns, rows = dataset_rows(shown, split, max_rows, shown=shown, revision=revision)
        found = Rows(source=shown, columns=columns, rows=rows)
    else:
        found = _load_local(paths, shown, split, max_rows, leave_out)
    if not found.rows:
        raise ValueError(f"{shown} has no rows in split {split!r}: nothing to read.")
    return found


def is_hub_id(path: str) -> bool:
    """Whether `path` can only be a dataset on the Hugging Face Hub."""
    file = Path(path).expanduser()
    return (
        path != PYTHON_DOCS
        and not file.exists()
        and kind_of(file) is None
        and bool(_HUB_ID.fullmatch(path))
    )


def data_files(
    path: str | Sequence[str], split: str = "train", *, leave_out: Path | None = None
) -> dict[str, list[Path]] | None:
    """The files that `load_rows` reads, by split, in order.

    Args:
      path: of `load_rows`.
      split: or a slice of it, or several.
      leave_out: a folder whose files are not data.

    Returns:
      None for sources other than our file formats: "python-docs", a dataset of the Hub, a folder
      that only `datasets` can read.

    Raises:
      FileNotFoundError: if there is no such file or folder.
      ValueError: if the split does not exist, or a file cannot be read.
    """
    paths = [path] if isinstance(path, str) else list(path)
    if paths == [PYTHON_DOCS] or (len(paths) == 1 and is_hub_id(paths[0])):
        return None
    splits: dict[str, list[Path]] = {}
    for each in paths:
        found = _find_files(each, leave_out)
        if found is None:
            if len(paths) > 1:
                raise ValueError(f"{each} cannot be read beside other data: give it alone.")
            return None
        for name, files in found.items():
            splits.setdefault(name, []).extend(files)
    # Refuse an unknown split before anything is read.
    _slices(" ".join(paths), split, dict.fromkeys(splits, 1 << 40))
    names = [split] if split in splits else _SPLIT_NAMES.findall(split)
    return {name: splits[name] for name in dict.fromkeys(names) if name in splits}


def is_text_file(path: str | Sequence[str]) -> bool:
    """Whether `path` is a file that holds one text, not a table."""
    if not isinstance(path, str):
        return False
    file = Path(path).expanduser()
    return file.is_file() and is_text(file)


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


def _load_local(
    paths: list[str], shown: str, split: str, max_rows: int | None, leave_out: Path | None
) -> Rows:
    """Reads files, folders and patterns in order."""
    found = data_files(paths, split, leave_out=leave_out)
    if found is None:
        folder = Path(paths[0]).expanduser()
        columns, rows = dataset_rows(str(folder), split, max_rows, shown=folder)
        return Rows(source=shown, columns=columns, rows=rows)
    most = max_rows if split in found else None
    read = {name: _read_files(files, most) for name, files in found.items()}
    files = [each for name in read for each in read[name]]
    kinds = {is_text(file) for file, _ in files}
    if len(kinds) > 1:
        raise ValueError(f"{shown} names texts and tables: use a separate run for each kind.")
    if len(files) == 1 and kinds == {True} and files[0][1].rows:
        return _document(str(files[0][0]), split, files[0][1].rows[0]["text"])
    return _join(shown if len(files) != 1 else str(files[0][0]), split, max_rows, read)


def _find_files(path: str, leave_out: Path | None) -> dict[str, list[Path]] | None:
    """The files of a path, by split; None: a folder that only `datasets` can read."""
    file = Path(path).expanduser()
    if file.is_file():
        return {"train": [file]}
    if file.is_dir():
        return _find_in_folder(file, leave_out)
    _refuse_special(file)
    if glob.has_magic(path):
        found = sorted(map(Path, glob.glob(str(file), recursive=True)))
        found = [each for each in found if not each.is_dir() and not _is_below(each, leave_out)]
        if not found:
            raise FileNotFoundError(f"No file matches {path}: check the pattern given as data.")
        for each in found:
            _refuse_special(each)
        return {"train": found}
    if path == PYTHON_DOCS:
        raise ValueError(f"{path} must be given alone.")
    if is_hub_id(path):
        raise ValueError(f"{path} is not a local file, and a Hub dataset must be given alone.")
    raise FileNotFoundError(f"no such file: {path}; check the path given as data.")


def _find_in_folder(folder: Path, leave_out: Path | None) -> dict[str, list[Path]] | None:
    known = [file for file in sorted(folder.rglob("*")) if kind_of(file) and not file.is_dir()]
    known = [file for file in known if not _is_below(file, leave_out)]
    for file in known:
        _refuse_special(file)
    is_whole = leave_out is None or not leave_out.exists() or not _is_below(leave_out, folder)
    if is_whole and not any(file.suffix.lower() == ".zst" for file in known):
        return folder_files(folder)
    return _stand_in_files(folder, leave_out)


def _stand_in_files(folder: Path, leave_out: Path | None) -> dict[str, list[Path]] | None:
    """`folder_files` of a folder of links, without ".zst", which `datasets` does not know."""
    with tempfile.TemporaryDirectory() as temporary:
        root, originals = Path(temporary).resolve(), {}
        for file in sorted(folder.rglob("*")):
            if not file.is_file() or _is_below(file, leave_out):
                continue
            link = root / file.relative_to(folder)
            link = link.with_suffix("") if link.suffix.lower() == ".zst" else link
            if link in originals:
                raise ValueError(f"{originals[link]} and {file} have the same name: remove one.")
            originals[link] = file
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())
        found = folder_files(root, shown=folder)
    return found and {split: [originals[file] for file in files] for split, files in found.items()}


def _is_below(file: Path, folder: Path | None) -> bool:
    return folder is not None and file.absolute().is_relative_to(folder.absolute())


def _refuse_special(file: Path) -> None:
    """Raises ValueError for files that never end or can be read only once."""
    if file.exists() and not file.is_file() and not file.is_dir():
        raise ValueError(
            f"{file} is a device, a pipe or a socket, not a regular file: write the data into a "
            "file first."
        )


def _read_files(files: list[Path], most: int | None) -> list[tuple[Path, FileRows]]:
    found: list[tuple[Path, FileRows]] = []
    for file in files:
        left = None if most is None else most - sum(len(each.rows) for _, each in found)
        if left == 0:
            break
        found.append((file, read_file(file, left)))
    return found


def _slices(shown: str, split: str, lengths: dict[str, int]) -> list[tuple[str, int, int]]:
    try:
        return slice_splits(split, lengths)
    except (ValueError, AssertionError) as error:
        raise ValueError(f"Cannot read {shown} as a dataset: {first_line(error)}") from error


def _join(
    source: str, split: str, max_rows: int | None, read: dict[str, list[tuple[Path, FileRows]]]
) -> Rows:
    """The rows of all files in the split, and their origins."""
    lengths = {name: sum(len(each.rows) for _, each in files) for name, files in read.items()}
    rows: list[dict[str, Any]] = []
    runs: list[_Run] = []
    columns: dict[str, None] = {}
    for name, first, end in _slices(source, split, lengths):
        start = 0
        for file, (names, found) in read[name]:
            low, high = max(first - start, 0), min(end - start, len(found))
            if low < high:
                runs.append(_Run(len(rows), str(file), low + 1))
                rows += found[low:high]
                columns |= dict.fromkeys(names)
            start += len(found)
    return Rows(source=source, columns=tuple(columns), rows=rows[:max_rows], runs=tuple(runs))
