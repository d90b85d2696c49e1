"""Folders of checkpoints on disk: a step is there whole, checked and synced, or not at all.

`checkpoints/<step>/` holds the files of one step and `manifest.json`, which lists them with their
sizes and hashes. What is being written has a name that starts with a dot.
"""

import contextlib
import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from tptt_jax.durable import swap_directory, sync_path

MANIFEST = "manifest.json"
_FORMAT = "tptt_jax step 1"
# What a disk says of bytes that it has lost. Everything else may be right again the next time.
_LOST = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO)


class DamagedStep(ValueError):
    """A step's files are missing, or not what was written."""


def list_steps(folder: Path) -> list[int]:
    """The steps in a folder, the oldest first; none if there is no such folder."""
    if not folder.is_dir():
        return []
    found = [each.name for each in folder.iterdir() if each.is_dir()]
    return sorted(int(name) for name in found if name.isascii() and name.isdecimal())


def write_step(folder: Path, step: int, fill: Callable[[Path], None]) -> None:
    """Writes a step; under its name it appears complete, and on disk.

    Args:
      folder: exists.
      step: its number; an earlier one is replaced.
      fill: makes the folder that it is given and writes the files; what it raises passes through.
    """
    partial, final = folder / f".{step}.partial", folder / str(step)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        fill(partial)
        _write_manifest(partial)
        for entry in partial.rglob("*"):
            sync_path(entry)
        sync_path(partial)
        _put(partial, final)
        sync_path(folder)
    except BaseException:
        # orbax adds an ending to the name while it writes.
        for left in folder.glob(f"{partial.name}*"):
            shutil.rmtree(left, ignore_errors=True)
        raise


def check_step(folder: Path, parts: Sequence[str]) -> None:
    """Compares the files of a step with its manifest.

    Args:
      folder: of the step.
      parts: names of the subfolders that are needed.

    Raises:
      DamagedStep: if a file is missing or was changed. A step from before there were manifests
        passes if its subfolders are there.
      OSError: if a file is there and cannot be read now.
    """
    for part in parts:
        if not (folder / part).is_dir():
            raise DamagedStep(f"{part} is missing")
    if not has_manifest(folder):
        return
    for name, (size, digest) in _read_manifest(folder / MANIFEST).items():
        if name.partition("/")[0] in parts:
            _check_file(folder, name, size, digest)


def is_lost(error: OSError) -> bool:
    """Whether bytes are gone for good, and not just out of reach."""
    # orbax's own errors have no number.
    return error.errno in (None, *_LOST)


def has_manifest(folder: Path) -> bool:
    """Whether the bytes of a step can be checked; before there were manifests they could not."""
    return (folder / MANIFEST).exists()


def remove_steps(folder: Path, steps: Sequence[int]) -> None:
    """Removes steps: first their names, so that no half of one is ever found."""
    for step in steps:
        doomed = folder / f".{step}.removed"
        with contextlib.suppress(OSError):
            (folder / str(step)).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes have left half written or half removed.

    A step that was to be replaced gets its name back, unless the new one is there.
    """
    for entry in list(folder.iterdir()) if folder.is_dir() else ():
        step, _, rest = entry.name.removeprefix(".").partition(".")
        if not step.isdecimal():
            continue
        if rest == "replaced" and not (folder / step).exists():
            entry.rename(folder / step)
        elif rest.startswith(("partial", "removed", "replaced", "orbax-checkpoint-tmp")):
            shutil.rmtree(entry, ignore_errors=True)


def _write_manifest(folder: Path) -> None:
    files = {
        entry.relative_to(folder).as_posix(): [entry.stat().st_size, _digest(entry)]
        for entry in sorted(folder.rglob("*"))
        if entry.is_file()
    }
    text = json.dumps({"format": _FORMAT, "files": files}, indent=1) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def _read_manifest(file: Path) -> dict[str, tuple[int, str]]:
    try:
        files = json.loads(file.read_text(encoding="utf-8"))["files"]
        return {str(name): (int(size), str(digest)) for name, (size, digest) in files.items()}
    except OSError as error:
        if not is_lost(error):
            raise
        raise DamagedStep(f"{MANIFEST}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise DamagedStep(f"{MANIFEST} is damaged") from None


def _check_file(folder: Path, name: str, size: int, digest: str) -> None:
    try:
        found = (folder / name).stat().st_size
        if found != size:
            raise DamagedStep(f"{name} has {found:,} bytes, {size:,} were written")
        if _digest(folder / name) != digest:
            raise DamagedStep(f"the bytes of {name} have changed")
    except FileNotFoundError:
        raise DamagedStep(f"{name} is missing") from None
    except OSError as error:
        if not is_lost(error):
            raise
        raise DamagedStep(f"{name}: {error.strerror}") from None


def _put(partial: Path, final: Path) -> None:
    if final.exists():
        # It may be sound: `remove_leftovers` brings it back if the new one does not come.
        old = final.with_name(f".{final.name}.replaced")
        shutil.rmtree(old, ignore_errors=True)
        swap_directory(partial, final, old)
        shutil.rmtree(old, ignore_errors=True)
    else:
        partial.rename(final)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
