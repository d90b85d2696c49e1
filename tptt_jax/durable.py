"""Atomic and durable writing of files and directories."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


def sibling(target: Path, role: str) -> Path:
    """A unique hidden name beside `target`."""
    return target.parent / f".{target.name}.{uuid.uuid4().hex[:12]}.{role}"


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yields a temporary sibling to write to, and renames it to `target` on success.

    Args:
      target: the final name; an existing file is replaced.

    Yields:
      The path to write to. It is removed if the block raises.

    Raises:
      ValueError: if `target` is a pipe, a device or a socket, which a file must not replace.
    """
    check_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = sibling(target, "partial")
    try:
        yield temporary
        sync_path(temporary)
        _rename(temporary, target)
        sync_path(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def check_replaceable(target: Path, name: str | None = None) -> None:
    """Raises ValueError if a path is a pipe, a device or a socket, which a file must not replace.

    Args:
      target: it may be missing.
      name: for the message; None: the path.
    """
    if target.exists() and not target.is_file() and not target.is_dir():
        raise ValueError(f"{name or target} is a pipe, a device or a socket: name a regular file.")


def _rename(temporary: Path, target: Path) -> None:
    try:
        temporary.replace(target)
    except OSError as error:
        # The user knows the name of the target, and never that of the temporary file.
        raise OSError(error.errno, error.strerror, str(target)) from None


def swap_directory(new: Path, target: Path, old: Path) -> None:
    """Replaces a directory by another; the previous one is renamed to `old`.

    If that fails, the previous one gets its name back.
    """
    target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        old.rename(target)
        raise


def sync_path(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
