"""Stores the result of each row at once, so that an interrupted evaluation can resume."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert.formats.files import check_regular

Result = dict[str, Any]


class RowStore:
    """Results of rows, by a key of all settings, in a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        """Reads the results of earlier calls; an incomplete last line is dropped.

        Raises:
          ValueError: if another line is damaged, or the path is not a regular file.
        """
        self._path = path
        self._results: dict[str, Result] = {}
        check_regular(path)
        whole = path.read_bytes().rpartition(b"\n")[0] if path.is_file() else b""
        for number, line in enumerate(whole.split(b"\n") if whole else (), start=1):
            self._results |= _read(line, f"{path}, line {number},")
        # An incomplete line would merge with the next one.
        if path.is_file():
            with path.open("r+b") as file:
                file.truncate(len(whole) + 1 if whole else 0)

    def get(self, key: str) -> Result | None:
        """The result of a row; None: not measured."""
        return self._results.get(key)

    def add(self, key: str, result: Result) -> None:
        """Stores a result; it is on disk when this returns."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "result": result}) + "\n")
        self._results[key] = result


def _read(line: bytes, place: str) -> dict[str, Result]:
    """The key and the result of a line."""
    try:
        saved = json.loads(line)
        key, result = saved["key"], saved["result"]
        if isinstance(key, str) and isinstance(result, dict):
            return {key: result}
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise ValueError(f"{place} holds no result of a row: remove the line to measure it again.")


def content_hash(data: Any) -> str:
    """A hash of the arrays that a model reads: the file that they come from may change."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(data):
        if isinstance(leaf, np.ndarray):
            digest.update(f"{leaf.dtype}{leaf.shape}".encode() + leaf.tobytes())
    return digest.hexdigest()[:24]


def row_key(**parts: Any) -> str:
    """A hash of everything that determines a row's result."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]
