"""Uploads an exported directory in one commit."""

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convert.errors import ConversionError, listing
from convert.formats.files import read_json
from convert.formats.finite_values import check_finite
from convert.formats.safetensors_io import FLOAT_TYPES, SafetensorsFile, TensorSpec
from convert.hub.failures import plain_failures
from convert.hub.repository import HubTarget
from convert.model_card import is_local_path, rename_card
from convert.notices import print_notice
from convert.overwriting import foreign_names
from convert.sources import PACKAGED_HUB_IDS
from convert.sources.source_files import is_own_file

_CARD = "README.md"
_GENERATED = "__pycache__"
_DESCRIPTIONS = ("config.json", "adapter_config.json")
# Keys of older settings that hold where a file was.
_PLACES = ("_name_or_path", "name_or_path", "tokenizer_file", "special_tokens_map_file")
_BASES = ("base_model_name_or_path", "base_model_name")
# What an earlier export may have left in the repository, and a loader would take for this one's.
_REPLACED = (
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("adapter_model.safetensors", "adapter_config.json", "config.json", "generation_config.json"),
    *("modeling_titan.py", "configuration_tptt.py", "modeling_tptt.py"),
)


def check_directory(directory: Path) -> list[Path]:
    """The files of an exported directory, if they may be pushed.

    Args:
      directory: written by `export_pretrained`.

    Raises:
      ConversionError: if it is not an export, holds other files or links that lead out of it, or
        has weights that are damaged or not finite.
    """
    if not any((directory / name).is_file() for name in _DESCRIPTIONS):
        raise ConversionError(
            f"{directory} is no exported model (it has no config.json): give a finished run, or "
            "what python -m convert export wrote."
        )
    if others := foreign_names(directory):
        raise ConversionError(
            f"{directory} also holds {listing(others[:5])}, which is not part of an export: move "
            "it, so that nothing is published by mistake."
        )
    files = sorted(
        path for path in directory.rglob("*") if path.is_file() and _GENERATED not in path.parts
    )
    outer = [path.name for path in files if not is_own_file(path, directory)]
    if outer:
        raise ConversionError(
            f"{listing(outer[:5])} in {directory} lead to files outside it: replace the links by "
            "copies, so that nothing is published by mistake."
        )
    weights = [path for path in files if path.suffix == ".safetensors"]
    if not weights:
        raise ConversionError(f"{directory} holds no weights (*.safetensors): export it again.")
    for path in weights:
        _check_weights(path)
    return files


def _check_weights(path: Path) -> None:
    file = SafetensorsFile(path)
    names = [name for name, info in file.tensors.items() if info.dtype in FLOAT_TYPES]
    specs = [
        TensorSpec(name, file.tensors[name].shape, FLOAT_TYPES[file.tensors[name].dtype])
        for name in names
    ]
    try:
        for _ in check_finite(specs, (file.read(name) for name in names)):
            pass
    except ConversionError as error:
        found = str(error).partition(" in ")[2].partition(";")[0]
        raise ConversionError(
            f"{path} holds NaN or infinite values in {found}: nothing was pushed; export an "
            "earlier checkpoint."
        ) from None


def push_directory(
    directory: Path, files: list[Path], target: HubTarget, again: str
) -> dict[str, str]:
    """Makes the repository and the branch, and uploads a directory in one commit.

    Weights and settings that an earlier export left there are replaced, other files stay.

    Args:
      directory: written by `export_pretrained`; not changed.
      files: its files, from `check_directory`.
      target: from `check_access`.
      again: what is safe, and the command that pushes again, for errors.

    Returns:
      "repository", "commit" and "url".

    Raises:
      ConversionError: if the hub does not take it.
    """
    with tempfile.TemporaryDirectory(prefix="tptt_jax_push_") as folder:
        staged = Path(folder) / "model"
        _stage(directory, files, staged, target.name)
        with _tidy_bars(), plain_failures(f"{target.name} was not pushed", target.name, again):
            commit = _upload(staged, target)
    return {"repository": target.name, "commit": commit.oid, "url": commit.commit_url}


@contextlib.contextmanager
def _tidy_bars() -> Iterator[None]:
    """Shows the library's progress bars on terminals only, and errors below them."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    is_terminal, had_bars = sys.stderr.isatty(), not are_progress_bars_disabled()
    if not is_terminal and had_bars:
        disable_progress_bars()
    try:
        yield
    except ConversionError:
        if is_terminal:
            print(file=sys.stderr)
        raise
    finally:
        if not is_terminal and had_bars:
            enable_progress_bars()


def _upload(staged: Path, target: HubTarget) -> Any:
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(target.name, private=target.private or None, exist_ok=True)
    if target.revision is not None:
        api.create_branch(target.name, branch=target.revision, exist_ok=True)
    return api.upload_folder(
        repo_id=target.name,
        folder_path=staged,
        revision=target.revision,
        commit_message="Upload a model of tptt_jax",
        delete_patterns=list(_REPLACED),
    )


def _stage(directory: Path, files: list[Path], staged: Path, name: str) -> None:
    """Links to the files, and copies of those that name this machine or the directory."""
    for file in files:
        place = staged / file.relative_to(directory)
        place.parent.mkdir(parents=True, exist_ok=True)
        if file.name == _CARD:
            place.write_text(rename_card(file.read_text(encoding="utf-8"), name), encoding="utf-8")
        elif file.suffix == ".json" and (content := _published(file)) is not None:
            place.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
        else:
            os.symlink(file.resolve(), place)


def _published(file: Path) -> dict[str, Any] | None:
    """A file of settings without places on this machine; None: it has none."""
    if file.name not in ("config.json", "adapter_config.json", "tokenizer_config.json"):
        return None
    content = read_json(file)
    changed = dict(content)
    for key in _PLACES:
        if _is_local(content.get(key)):
            del changed[key]
    for key in _BASES:
        if isinstance(content.get(key), str) and _is_local_base(content[key]):
            changed[key] = _public_base(file, key, content[key])
    return None if changed == content else changed


def _public_base(file: Path, key: str, base: str) -> str | None:
    """The base model's name for others; None: users have to give it."""
    if base in PACKAGED_HUB_IDS:
        return PACKAGED_HUB_IDS[base]
    if file.name == "config.json":
        raise ConversionError(
            f"{file} names its base model by a path of this machine ({key}), and the package tptt "
            "reads it there: train on a hub id, or push another format."
        )
    print_notice(
        f"the base model {Path(base).name} is a folder of this machine, so the pushed adapter does "
        "not name it: who loads it has to give the base model"
    )
    return None


def _is_local_base(base: str) -> bool:
    return base in PACKAGED_HUB_IDS or is_local_path(base) or Path(base).expanduser().exists()


def _is_local(value: Any) -> bool:
    return isinstance(value, str) and is_local_path(value)
