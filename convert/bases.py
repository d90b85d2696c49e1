"""The base model beneath an adapter or a checkpoint."""

import os
from pathlib import Path

from convert.adapters import is_adapter, read_adapter_config
from convert.errors import ConversionError
from convert.sources import PACKAGED_SOURCES, Source, find_checkpoint, locate, parse_hub_name
from convert.tptt import is_tptt, read_tptt_config


def base_source(directory: Path) -> str:
    """The base model of a PEFT or tptt directory, as `load_pretrained` takes it.

    Args:
      directory: such a directory.

    Returns:
      A packaged model's name, an absolute path that exists, or a hub id, with "@" and the
      revision if there is one.

    Raises:
      ConversionError: if it names none, a revision of a path, a path that does not exist here, or a
        model that has adapters itself.
    """
    if is_tptt(directory):
        return _checked_name(directory, _tptt_base(directory))
    config = read_adapter_config(directory)
    name = config.base
    if name is None:
        raise ConversionError(
            f"{directory} does not name its base model (base_model_name_or_path); "
            f"{_remedy(directory)}."
        )
    if config.revision in (None, "main"):
        return _checked_name(directory, name)
    hub = parse_hub_name(f"{name}@{config.revision}")
    if hub is None or hub.revision != config.revision or _exists(Path(name)):
        raise ConversionError(
            f"{directory} belongs to revision {config.revision!r:.80} of {name}; fetch that, and "
            f"{_remedy(directory)}."
        )
    return str(hub)


def _tptt_base(directory: Path) -> str:
    config = read_tptt_config(directory)
    if config.subfolder is None:
        return config.base
    if not _exists(Path(config.base)):
        raise ConversionError(
            f"{directory} has its base model in folder {config.subfolder!r:.200} of {config.base}; "
            f"fetch that, and {_remedy(directory)}."
        )
    return str(Path(config.base) / config.subfolder)


def _checked_name(directory: Path, name: str) -> str:
    if name in PACKAGED_SOURCES:
        return name
    path = Path(name)
    exists = _exists(path)
    if not exists if path.is_absolute() else exists or parse_hub_name(name) is None:
        problem = (
            "does not exist here"
            if path.is_absolute()
            else "is a path relative to an unknown folder"
        )
        raise ConversionError(
            f"{directory} names {name!r:.200} as its base model, which {problem}; "
            f"{_remedy(directory)}."
        )
    if exists and (has_base(path) or find_checkpoint(path)):
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


def _remedy(directory: Path) -> str:
    return (
        f"name the base model: load_pretrained(BASE_MODEL, adapter={str(directory)!r}), or "
        f"--model BASE_MODEL --adapter {directory}"
    )


def has_base(path: Path) -> bool:
    """Whether a path is a PEFT or tptt directory, which names its base model."""
    return is_adapter(path) or is_tptt(path)


def locate_base(directory: Path, *, weights: bool = True) -> Path:
    """Finds, fetches or assembles the base model of such a directory (see `locate`).

    Raises:
      ConversionError: if it does not exist; the message has the remedy.
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
    """The base model of our checkpoints and of PEFT and tptt directories.

    Returns:
      What `load_pretrained` takes; paths are absolute, so they are valid in any folder.

    Raises:
      ConversionError: if the model does not exist.
    """
    while described := find_checkpoint(source):
        source = described.source
    name = os.fspath(source)
    if name in PACKAGED_SOURCES:
        return name
    path = locate(source, weights=False)
    if has_base(path):
        return base_source(path)
    given = Path(source).expanduser()
    return str(given.resolve()) if given.exists() else name
