"""Names of output directories after model and data."""

import glob
import re
from collections.abc import Sequence
from pathlib import Path

DEFAULT_OUTPUT = Path("runs/MODEL-DATA")
"""Stands for `name_output`, in --help too."""

_LONGEST = 40
_EXTENSIONS = re.compile(r"\.(gguf|jsonl|ndjson|json|csv|tsv|parquet|txt|md|rst|gz|zst)$")


def name_output(model: str, data: str | Sequence[str]) -> Path:
    """runs/smollm2-135m-python-docs for "smollm2-135m" and "python-docs".

    Args:
      model: name, path or hub id; a revision behind "@" is left out.
      data: likewise, or several; the first one gives the name.
    """
    paths = [data] if isinstance(data, str) else data
    names = (_short(model.partition("@")[0]), _short(paths[0]))
    more = f"-and-{len(paths) - 1}-more" if len(paths) > 1 else ""
    return Path("runs") / ("-".join(filter(None, names)) + more or "run")


def _short(path: str) -> str:
    """The last part of a path without extensions, in letters that no shell changes."""
    parts = [part for part in Path(path).parts if not glob.has_magic(part)]
    name = parts[-1].lower() if parts else ""
    while shorter := _EXTENSIONS.sub("", name):
        if shorter == name:
            break
        name = shorter
    return re.sub(r"[^a-z0-9._]+", "-", name).strip("-.")[:_LONGEST]
