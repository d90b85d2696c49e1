"""Fingerprints of a run's data: hashes of its files and its rows."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data import StreamSource, TokenBatchSource
from experiments.data.data_files import FoundData

# Hashed bytes of a data file: a quarter of a gigabyte.
_BLOCK, _BLOCKS = 2**20, 256


def of_data(found: FoundData | None) -> dict[str, Any] | None:
    """Names a data set; for files also their size and a hash of their contents, in order.

    Args:
      found: what --data or --fit-data names; None: nothing.

    Raises:
      OSError: if a file cannot be read.
    """
    if found is None:
        return None
    if found.files is None:
        return {"name": found.shown}
    digest, size = hashlib.sha256(), 0
    for file in (each for files in found.files.values() for each in files):
        size += file.stat().st_size
        digest.update(f"{_file_digest(file)}\n".encode())
    paths = (str(Path(each).expanduser().resolve()) for each in found.paths)
    name = found.shown if found.is_hub else " ".join(paths)
    return {"name": name, "bytes": size, "sha256": digest.hexdigest()}


def of_rows(*sources: TokenBatchSource | StreamSource | None) -> str | None:
    """A hash of rows of tokens and their loss masks; None: no rows, or none in memory."""
    known = [rows for rows in sources if isinstance(rows, TokenBatchSource)]
    digest = hashlib.sha256()
    for rows in known:
        for array in (rows.tokens, rows.segment_ids, rows.loss_mask):
            digest.update(f"{array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest() if known else None


def _file_digest(file: Path) -> str:
    """A hash of all bytes, or of evenly spaced blocks of a large file."""
    size, digest = file.stat().st_size, hashlib.sha256()
    starts = range(0, size, _BLOCK)
    with file.open("rb") as stream:
        for start in starts[:: max(1, len(starts) // _BLOCKS)]:
            stream.seek(start)
            digest.update(stream.read(_BLOCK))
    return digest.hexdigest()


def is_same_data(before: dict[str, Any] | None, now: dict[str, Any] | None) -> bool:
    """Whether two data sets are equal by their hashes, or without hashes by their names."""
    if before is None or now is None:
        return before == now
    keys = ("bytes", "sha256") if "sha256" in before and "sha256" in now else ("name",)
    return all(before.get(key) == now.get(key) for key in keys)


def describe_data(data: dict[str, Any] | None) -> str:
    """The name for messages; for files with their size and the start of the hash."""
    if data is None:
        return "the training data"
    if "sha256" not in data:
        return str(data["name"])
    return f"{data['name']} ({data['bytes']:,} bytes, sha256 {str(data['sha256'])[:8]})"
