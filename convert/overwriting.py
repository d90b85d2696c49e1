"""Protects a model's own sources and unrelated files from `--overwrite`."""

import fnmatch
import os
from pathlib import Path

from convert.bases import base_source, has_base
from convert.errors import ConversionError, listing
from convert.sources import PACKAGED_SOURCES, Source
from convert.sources.opening import TOKENIZER_PATTERNS
from tptt_jax.training.description import is_checkpoint, read_description

# Files of an export; tokenizers add some more.
_OURS = (
    *("config.json", "generation_config.json", "adapter_config.json", "README.md", "*.py"),
    *("*.safetensors", "*.safetensors.index.json", "additional_chat_templates", "__pycache__"),
    *TOKENIZER_PATTERNS,
)


def needed_paths(source: Source) -> list[Path]:
    """The files and folders that a model is loaded from: its own, its base's, and so on.

    Args:
      source: what `load_pretrained` takes; hub ids and packaged models have no path.

    Raises:
      ValueError: if a checkpoint or an adapter among them cannot be read.
    """
    needed: list[Path] = []
    name = os.fspath(source)
    while name not in PACKAGED_SOURCES:
        path = Path(name).expanduser()
        if not path.exists() or path.resolve() in needed:
            break
        needed.append(path.resolve())
        if is_checkpoint(path):
            name = read_description(path).source
        elif has_base(path):
            name = base_source(path)
        else:
            break
    return needed


def check_overwrite(output: Path, source: Source | None) -> None:
    """Refuses to replace a directory that is needed, or holds files other than an export's.

    Args:
      output: the directory; a missing or empty one passes.
      source: the model to be written, as `load_pretrained` takes it; None: unknown.

    Raises:
      ConversionError: if it may not be replaced.
    """
    if not output.is_dir():
        return
    target = output.resolve()
    for path in () if source is None else needed_paths(source):
        if path.is_relative_to(target):
            raise ConversionError(
                f"{output} cannot be overwritten: {source} is loaded from {path}; "
                "choose another directory."
            )
    if others := foreign_names(output):
        raise ConversionError(
            f"{output} also holds {listing(others[:5])}, which is not part of an export: move it, "
            "or choose another directory."
        )


def foreign_names(directory: Path) -> list[str]:
    """The files and folders of a directory that no export writes, in order."""
    names = sorted(entry.name for entry in directory.iterdir())
    return [name for name in names if not any(fnmatch.fnmatch(name, each) for each in _OURS)]
