"""Stores the result of each row at once, so that an interrupted evaluation can resume."""

import hashlib
import json
from pathlib import Path
from typing import Any

Result = dict[str, Any]


class RowStore:
    """Results of rows, by a key of all settings, in a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        """Reads the results of earlier calls; an incomplete last line is dropped."""
        self._path = path
        self._results: dict[str, Result] = {}
        whole = path.read_bytes().rpartition(b"\n")[0] if path.is_file() else b""
        for line in whole.splitlines():
            saved = json.loads(line)
            self._results[saved["key"]] = saved["result"]
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


def row_key(**parts: Any) -> str:
    """A hash of everything that determines a row's result."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]
