"""Folders of checkpoints on disk: a step is complete, verified and synced, or absent.

`checkpoints/<step>/` holds the files of one step and `manifest.json`, which lists them with their
sizes and hashes. Names of unfinished steps start with a dot.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from tptt_jax.durable import swap_directory, sync_path

MANIFEST = "manifest.json"
_FORMAT = "tptt_jax step 1"
# Errors of lost data. All others may be temporary.
_LOST = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO)


class DamagedStep(ValueError):
    """A step's files are missing or have changed."""


def checkpoint_folder(path: str | os.PathLike[str]) -> Path:
    """Where the steps of a run's directory are."""
    return Path(path).resolve() / "checkpoints"


def last_step(folder: Path) -> int | None:
    """The last complete step in a folder; its files are not checked for damage."""
    steps = list_steps(folder)
    return steps[-1] if steps else None


def list_steps(folder: Path) -> list[int]:
    """The steps in a folder, oldest first; none if the folder does not exist."""
    if not folder.is_dir():
        return []
    found = [each.name for each in folder.iterdir() if each.is_dir()]
    return sorted(int(name) for name in found if name.isascii() and name.isdecimal())


def write_step(folder: Path, step: int, fill: Callable[[Path], None]) -> None:
    """Writes a step; it appears under its name once it is complete and on disk.

    Args:
      folder: an existing folder.
      step: its number; an earlier one is replaced.
      fill: creates the given folder and writes the files; its exceptions pass through.
    """
    fill_step(folder, step, start_step(folder, step), fill)


def start_step(folder: Path, step: int, *, clean: bool = True) -> Path:
    """The name of the folder that a step's files are written to.

    Args:
      folder: an existing folder.
      step: its number.
      clean: remove what is left there of a killed process.
    """
    partial = folder / f".{step}.partial"
    if clean:
        shutil.rmtree(partial, ignore_errors=True)
    return partial


def fill_step(folder: Path, step: int, partial: Path, fill: Callable[[Path], None]) -> None:
    """`write_step` after `start_step`, which gave `partial`."""
    final = folder / str(step)
    try:
        fill(partial)
        _write_manifest(partial)
        for entry in partial.rglob("*"):
            sync_path(entry)
        sync_path(partial)
        _put(partial, final)
        sync_path(folder)
    except BaseException:
        # orbax appends a suffix to the name during the write.
        for left in folder.glob(f"{partial.name}*"):
            shutil.rmtree(left, ignore_errors=True)
        raise


def check_step(folder: Path, parts: Sequence[str]) -> None:
    """Compares the files of a step with its manifest.

    Args:
      folder: of the step.
      parts: names of the subfolders that are needed.

    Raises:
      DamagedStep: if a file is missing or was changed. An older step without a manifest passes if
        its subfolders exist.
      OSError: if a file exists but cannot be read now.
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
    """Whether data is lost permanently, and not just unavailable."""
    # orbax's own errors have no number.
    return error.errno in (None, *_LOST)


def has_manifest(folder: Path) -> bool:
    """Whether a step has a manifest, so that its bytes can be checked; older ones have none."""
    # Also a link to nothing: what cannot be compared is not to be trusted.
    return os.path.lexists(folder / MANIFEST)


def remove_steps(folder: Path, steps: Sequence[int]) -> None:
    """Removes steps; it renames them first, so that no reader finds a part of one."""
    for step in steps:
        doomed = folder / f".{step}.removed"
        with contextlib.suppress(OSError):
            (folder / str(step)).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Removes partly written or removed steps of killed processes.

    A step that was being replaced gets its name back, unless the new one exists.
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
        _refuse_special(file, MANIFEST)
        files = json.loads(file.read_text(encoding="utf-8"))["files"]
        return {str(name): (int(size), str(digest)) for name, (size, digest) in files.items()}
    except OSError as error:
        if not is_lost(error):
            raise
        raise DamagedStep(f"{MANIFEST}: {error.strerror}") from None
    except DamagedStep:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise DamagedStep(f"{MANIFEST} is damaged") from None


def _refuse_special(file: Path, name: str) -> None:
    """Raises DamagedStep for a pipe, which would block for ever, and the like."""
    if file.exists() and not file.is_file():
        raise DamagedStep(f"{name} is not a regular file")


def _check_file(folder: Path, name: str, size: int, digest: str) -> None:
    try:
        _refuse_special(folder / name, name)
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
        # It may be undamaged: `remove_leftovers` restores it if the new one never appears.
        old = final.with_name(f".{final.name}.replaced")
        shutil.rmtree(old, ignore_errors=True)
        swap_directory(partial, final, old)
        shutil.rmtree(old, ignore_errors=True)
    else:
        partial.rename(final)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
