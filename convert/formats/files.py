"""Atomic writing of files and directories, and JSON."""

import contextlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from convert.errors import ConversionError, listing
from tptt_jax.durable import sibling, swap_directory, sync_path

# Far above any real file, far below Python's recursion limit.
_MAX_DEPTH = 100


def check_export_target(target: Path, *, overwrite: bool) -> None:
    """Refuses a target that is not empty.

    Args:
      target: where a directory is to be written.
      overwrite: whether an earlier model directory may be replaced.

    Raises:
      ConversionError: if `target` is a file, or a directory that is not empty and either
        `overwrite` is False or it does not look like a model directory.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise ConversionError(f"{target} is a file; give a directory to write.")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise ConversionError(
            f"{target} exists and is not empty; choose another directory, or allow --overwrite."
        )
    if not any((target / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ConversionError(
            f"{target} is not a model directory (it has no config.json), so it is not "
            "overwritten; remove it yourself or choose another directory."
        )


@contextlib.contextmanager
def atomic_directory(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary sibling directory and renames it to `target` on success.

    Args:
      target: the final name.
      overwrite: whether an earlier model directory of that name is replaced.

    Yields:
      An empty directory to fill. It is removed if the block raises.

    Raises:
      ConversionError: if `target` exists and may not be replaced.
    """
    target = target.absolute()
    check_export_target(target, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = sibling(target, "partial")
    temporary.mkdir()
    try:
        yield temporary
        for entry in temporary.rglob("*"):
            if entry.is_file():
                sync_path(entry)
        sync_path(temporary)
        _swap(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(temporary: Path, target: Path) -> None:
    """Replaces `target` by `temporary`; the old directory is kept until that succeeds."""
    if not target.exists():
        temporary.rename(target)
    else:
        old = sibling(target, "old")
        swap_directory(temporary, target, old)
        shutil.rmtree(old)
    sync_path(target.parent)


def unique_keys(path: Path) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """A hook for `json.loads` that refuses objects with repeated keys.

    Args:
      path: the file that the error message names.

    Returns:
      The `object_pairs_hook`; it raises `ConversionError`.
    """

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            counts = Counter(key for key, _ in pairs)
            twice = listing(key for key, count in counts.items() if count > 1)
            raise ConversionError(f"{path} names {twice} more than once: remove the others.")
        return result

    return build


def check_regular(path: Path) -> None:
    """Refuses paths that exist but are not regular files.

    Reading a pipe may block for ever, and a device may never end.

    Raises:
      ConversionError: if `path` exists and is neither a regular file nor a link to one.
    """
    if path.exists() and not path.is_file():
        kind = "a directory" if path.is_dir() else "a pipe, a device or a socket"
        raise ConversionError(f"{path} is {kind}; it must be a regular file.")


def parse_json(text: str, path: Path, problem: str = "is not valid JSON") -> Any:
    """Parses JSON from an untrusted file.

    Args:
      text: the content.
      path: the file, for error messages.
      problem: the problem that they report.

    Raises:
      ConversionError: if it is not JSON, repeats a key, or is nested too deeply.
    """
    too_deep = f"{path} {problem}: it is nested more than {_MAX_DEPTH} deep."
    try:
        content = json.loads(text, object_pairs_hook=unique_keys(path))
    except ConversionError:
        raise
    except RecursionError:
        raise ConversionError(too_deep) from None
    # ValueError: syntax, and integers of more than 4,300 digits.
    except ValueError as error:
        raise ConversionError(f"{path} {problem}: {error}.") from None
    level, depth = [content], 0
    while level := [each for each in level if isinstance(each, dict | list)]:
        depth += 1
        if depth > _MAX_DEPTH:
            raise ConversionError(too_deep)
        level = [
            inner for each in level for inner in (each.values() if type(each) is dict else each)
        ]
    return content


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file that must hold one JSON object.

    Raises:
      ConversionError: if the file is missing or not a regular file, is not JSON, is not an object,
        is nested more than a hundred deep, or repeats a key.
    """
    check_regular(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConversionError(f"no such file: {path}.") from None
    except UnicodeDecodeError as error:
        raise ConversionError(f"{path} is not valid JSON: {error}.") from None
    content = parse_json(text, path)
    if not isinstance(content, dict):
        raise ConversionError(
            f"{path} must hold a JSON object, it holds a {type(content).__name__}."
        )
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON object in Hugging Face's style: two spaces, a final newline."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
