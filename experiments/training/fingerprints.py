"""Fingerprints of a run: hashes of its data files, its rows and its base weights."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from experiments.data import TokenBatchSource
from experiments.data.data_files import FoundData
from tptt_jax import CausalLM
from tptt_jax.training.partition import dotted, is_base_weight

# Training changes nearly all values; this many samples of each tensor show it.
_SAMPLES = 4096
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


def of_rows(rows: TokenBatchSource | None) -> str | None:
    """A hash of rows of tokens and their loss masks; None: no rows."""
    if rows is None:
        return None
    digest = hashlib.sha256()
    for array in (rows.tokens, rows.segment_ids, rows.loss_mask):
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def of_weights(model: CausalLM, *, adapters: bool) -> dict[str, str]:
    """Shapes and hashes of sampled values of the loaded tensors, by dotted path.

    Args:
      model: as loaded.
      adapters: whether its adapters are loaded too; else they are new.
    """
    found = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = dotted(path)
        if is_base_weight(name) or (adapters and ".lora." in name):
            value = variable.get_value()
            if next(iter(value.devices())).platform == "cpu":
                value = np.asarray(value)  # no copy, and no compilation for each shape
            flat = value.reshape(-1)
            # From an accelerator, only the samples are copied to the host.
            some = np.ascontiguousarray(flat[:: max(1, flat.size // _SAMPLES)])
            content = hashlib.sha256(some.view(np.uint8).data).hexdigest()[:16]
            found[name] = f"{list(value.shape)} {content}"
    return found


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
