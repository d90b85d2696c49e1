"""The base model beneath an adapter or a checkpoint."""

import os
from pathlib import Path

from convert.adapter_config import is_adapter, read_adapter_config
from convert.demo import DEMO_SOURCES
from convert.errors import ConversionError
from convert.sources import HUB_ID, Source, find_checkpoint, locate


def base_source(directory: Path) -> str:
    """The base model that a PEFT directory names, as `load_pretrained` takes it.

    Args:
      directory: a PEFT directory.

    Returns:
      "demo", an absolute path that exists, or a hub id.

    Raises:
      ConversionError: if it names none, a revision, a path that means nothing here, or a model
        that has adapters itself.
    """
    config = read_adapter_config(directory)
    name = config.base
    if name is None:
        raise ConversionError(
            f"{directory} does not name its base model (base_model_name_or_path); "
            f"{_remedy(directory)}."
        )
    if config.revision not in (None, "main"):
        raise ConversionError(
            f"{directory} belongs to revision {config.revision!r:.80} of {name}; fetch that, and "
            f"{_remedy(directory)}."
        )
    if name in DEMO_SOURCES:
        return name
    path = Path(name)
    exists = _exists(path)
    if not exists if path.is_absolute() else exists or not _is_hub_id(name):
        problem = (
            "does not exist here"
            if path.is_absolute()
            else "is a path relative to a folder that it does not name"
        )
        raise ConversionError(
            f"{directory} names {name!r:.200} as its base model, which {problem}; "
            f"{_remedy(directory)}."
        )
    if exists and (is_adapter(path) or find_checkpoint(path)):
        raise ConversionError(
            f"{directory} names {name} as its base model, which has adapters itself; export that "
            f'as "merged", and {_remedy(directory)}.'
        )
    return name


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _is_hub_id(name: str) -> bool:
    # Longer ones the hub does not give.
    return len(name) <= 96 and HUB_ID.fullmatch(name) is not None


def _remedy(directory: Path) -> str:
    return (
        f"name the base model: load_pretrained(BASE_MODEL, adapter={str(directory)!r}), or "
        f"--model BASE_MODEL --adapter {directory}"
    )


def locate_base(directory: Path, *, weights: bool = True) -> Path:
    """Finds, fetches or assembles the base model of a PEFT directory (see `locate`).

    Raises:
      ConversionError: if there is no such thing, with what to do about it.
    """
    name = base_source(directory)
    try:
        return locate(name, weights=weights)
    except ConversionError as error:
        raise ConversionError(
            f"{str(error).rstrip('.')}. It is the base model that {directory} names: "
            f"{_remedy(directory)}."
        ) from None


def resolve_base(source: Source) -> str:
    """The base model beneath checkpoints of ours and PEFT directories.

    Returns:
      What `load_pretrained` takes; paths are absolute, so that they mean the same anywhere.

    Raises:
      ConversionError: if there is no such model.
    """
    while described := find_checkpoint(source):
        source = described.source
    name = os.fspath(source)
    if name in DEMO_SOURCES:
        return name
    path = locate(source, weights=False)
    if is_adapter(path):
        return base_source(path)
    given = Path(source).expanduser()
    return str(given.resolve()) if given.exists() else name
