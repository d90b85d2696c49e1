"""Rows of any number of files, read one at a time: an index says where each row begins.

JSON Lines files are read where they lie. Of other files, and of data sets that only `datasets`
reads, a copy as JSON Lines is made first, row by row. Indices and copies are kept in the cache.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convert.sources.demo import cache_directory
from experiments.data.data_files import PYTHON_DOCS, FoundData
from experiments.data.file_rows import iterate_rows, parsed_line
from experiments.data.hub_rows import iterate_dataset
from experiments.data.rows import python_docs_text
from experiments.data.text_files import text_blocks, text_suffix
from tptt_jax.durable import atomic_file

_BLOCK = 1 << 20
# "{}" and a line's end: what is shorter holds no row.
_SHORTEST_LINE = 3
_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")


class _Lines(NamedTuple):
    """Rows of one origin: the JSON Lines file that holds them, and where each begins."""

    origin: str
    file: Path
    starts: np.ndarray


class IndexedRows:
    """A table on disk, of which rows are read by their index."""

    def __init__(self, shown: str, parts: list[_Lines], most: int | None) -> None:
        """Takes the parts in order.

        Args:
          shown: name of the data in messages.
          parts: not all empty.
          most: rows that count; None: all.
        """
        self.shown = shown
        self._parts = parts
        self._ends = list(accumulate(len(part.starts) for part in parts))
        self._count = min(self._ends[-1], self._ends[-1] if most is None else most)

    def __len__(self) -> int:
        """Number of rows."""
        return self._count

    def place(self, index: int) -> tuple[str, int]:
        """Names the file of a row, and the row's number there, counted from 1."""
        part, number = self._find(index)
        return part.origin, number + 1

    def read(self, index: int) -> dict[str, Any]:
        """Reads a row.

        Raises:
          ValueError: if it is not a JSON object; the message names it.
        """
        part, number = self._find(index)
        with part.file.open("rb") as stream:
            stream.seek(int(part.starts[number]))
            line = stream.readline()
        place = f"{part.origin}, row {number + 1},"
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{place} is not UTF-8 text ({error.reason}): repair it.") from None
        return parsed_line(text, place)

    def _find(self, index: int) -> tuple[_Lines, int]:
        found = bisect_right(self._ends, index)
        return self._parts[found], index - (self._ends[found - 1] if found else 0)


def index_rows(
    found: FoundData, split: str, revision: str | None = None, most: int | None = None
) -> IndexedRows:
    """Prepares the rows of a data source for reading by index, in constant memory.

    Args:
      found: from `find_data`.
      split: a whole one.
      revision: of a data set on the Hub.
      most: most rows to use; None: all.

    Raises:
      ValueError: if there is nothing to read, or `split` is a slice.
    """
    if found.paths == (PYTHON_DOCS,):
        text = python_docs_text()
        digest = hashlib.sha256(text.encode()).hexdigest()
        rows = ({"text": block} for block in text_blocks(text.splitlines(keepends=True)))
        parts = [_copied(PYTHON_DOCS, digest, rows)]
    elif found.files is None:
        parts = [_dataset(found, split, revision, most)]
    elif split not in found.files:
        raise ValueError(
            f"--data.streaming reads whole splits, not {split!r}: name one of "
            f"{', '.join(found.files)}, and limit the rows with --data.max-rows."
        )
    else:
        parts = [_of_file(file) for file in found.files[split]]
    if not sum(len(part.starts) for part in parts):
        raise ValueError(f"{found.shown} has no rows in split {split!r}: nothing to read.")
    return IndexedRows(found.shown, parts, most)


def _of_file(file: Path) -> _Lines:
    status = file.stat()
    key = f"{file.resolve()} {status.st_size} {status.st_mtime_ns}"
    if text_suffix(file) not in (".jsonl", ".ndjson") or file.suffix in (".gz", ".zst"):
        return _copied(str(file), key, iterate_rows(file))
    with file.open("rb") as stream:
        if stream.read(3).startswith(_MARKS):
            return _copied(str(file), key, iterate_rows(file))
    kept = _kept(key, ".npy")
    if not kept.is_file():
        _write_starts(file, kept)
    return _Lines(str(file), file, _read_starts(kept))


def _dataset(found: FoundData, split: str, revision: str | None, most: int | None) -> _Lines:
    """What `datasets` streams, as far as it is needed."""
    if not found.is_hub:
        folder = Path(found.shown).expanduser().resolve()
        _, rows = iterate_dataset(str(folder), split)
        key = f"{folder} {split} {_folder_state(folder)} {most}"
        return _copied(found.shown, key, islice(rows, most))
    commit, rows = iterate_dataset(found.shown, split, revision=revision)
    newest = _kept(f"{found.shown} {split} {revision} {most}", ".commit")
    if commit is None and newest.is_file():  # no network
        commit = newest.read_text(encoding="utf-8")
    copied = _copied(found.shown, f"{found.shown} {split} {commit} {most}", islice(rows, most))
    if commit is not None:
        with atomic_file(newest) as path:
            path.write_text(commit, encoding="utf-8")
    return copied


def _folder_state(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change of each file of a folder; `datasets` reads no hidden ones."""
    names = (file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file())
    shown = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    states = [(folder / name).stat() for name in shown]
    return [
        (str(name), state.st_size, state.st_mtime_ns)
        for name, state in zip(shown, states, strict=True)
    ]


def _copied(origin: str, key: str, rows: Iterable[dict[str, Any]]) -> _Lines:
    """Writes rows as JSON Lines, unless an earlier run did."""
    lines, starts = _kept(key, ".jsonl"), _kept(key, ".npy")
    if not starts.is_file() or not lines.is_file():
        with atomic_file(lines) as path, path.open("w", encoding="utf-8") as stream:
            for row in rows:
                stream.write(json.dumps(row, default=str) + "\n")
        _write_starts(lines, starts)
    return _Lines(origin, lines, _read_starts(starts))


def _kept(key: str, suffix: str) -> Path:
    name = hashlib.sha256(key.encode()).hexdigest()[:24]
    return cache_directory() / "streams" / f"{name}{suffix}"


def _write_starts(file: Path, kept: Path) -> None:
    with atomic_file(kept) as path, path.open("wb") as stream:
        np.save(stream, _line_starts(file))


def _read_starts(kept: Path) -> np.ndarray:
    try:
        return np.load(kept, mmap_mode="r")  # only the pages that are read take memory
    except ValueError:
        return np.load(kept)  # of no rows: nothing can be mapped


def _line_starts(file: Path) -> np.ndarray:
    """Where the lines of a file that hold something begin, in bytes [n]."""
    ends, offset = [np.zeros(1, np.int64)], 0
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + offset + 1)
            offset += len(block)
    starts = np.concatenate(ends)
    lengths = np.diff(starts, append=offset)
    # The last line may have no end.
    needed = np.full(len(starts), _SHORTEST_LINE)
    needed[-1] = _SHORTEST_LINE - 1
    return starts[lengths >= needed]
