"""Output directories: checks that they are writable, and locks for one process at a time."""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from tptt_jax.durable import check_replaceable

_LOCK = "run.lock"
# Longest path of checkpoints, weights and temporary files inside it.
_LONGEST_BELOW = 160
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextlib.contextmanager
def locked_output(output: Path) -> Iterator[None]:
    """Makes a directory and locks it against other processes of ours inside the block.

    The lock is the system's (flock), so it ends with the process in any case. New directories are
    removed again if the block leaves them empty.

    Args:
      output: what --output names.

    Raises:
      ValueError: if it cannot be written, or another process works in it.
    """
    try:
        check_path(output)
        made = _make(output)
    except OSError as error:
        raise ValueError(_complaint(output, error)) from None
    file = output / _LOCK
    try:
        try:
            descriptor = _acquire(file, output)
        except OSError as error:
            raise ValueError(_complaint(output, error)) from None
        try:
            yield
        finally:
            # Remove it while locked: another process that opened it checks again.
            with contextlib.suppress(OSError):
                file.unlink()
            os.close(descriptor)
    finally:
        for folder in made:
            # Directories that are not empty stay.
            with contextlib.suppress(OSError):
                folder.rmdir()


def check_output_file(file: Path, option: str) -> None:
    """Raises ValueError if a file cannot be written; call it before computing the content."""
    try:
        if file.is_dir():
            raise ValueError(f"{option} {file} is a directory: name a file.")
        check_replaceable(file, f"{option} {file}")
        if file.is_symlink() and not file.exists():
            target = os.readlink(file)
            raise ValueError(
                f"{option} {file} is a link to {target}, which is missing: name another file."
            )
        existing = next(each for each in file.absolute().parents if each.exists())
        is_writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    except OSError as error:
        raise ValueError(
            f"{option} {file} cannot be written ({error.strerror}): name another file."
        ) from None
    if not is_writable:
        raise ValueError(
            f"{option} {file} cannot be written, as {existing} is not writable: name another file."
        )


def check_path(output: Path) -> None:
    """Raises ValueError if --output exists and is not a directory, or cannot become one."""
    try:
        _check_path(output)
    except OSError as error:
        raise ValueError(_complaint(output, error)) from None


def _check_path(output: Path) -> None:
    for each in (output, *output.absolute().parents):
        if each.is_symlink() and not each.exists():
            raise ValueError(
                f"--output {output}: {each} is a link to {os.readlink(each)}, which is missing: "
                "remove the link, or make that directory."
            )
        if each.exists() and not each.is_dir():
            what = "is a file" if each == output else f"lies below {each}, which is a file"
            raise ValueError(f"--output {output} {what}: name a directory.")
    longest = os.pathconf("/", "PC_PATH_MAX") - _LONGEST_BELOW
    if len(os.fsencode(output.absolute())) > longest:
        raise ValueError(
            f"--output has {len(os.fsencode(output.absolute()))} bytes, at most {longest} are "
            "allowed: choose a shorter path."
        )


def _make(output: Path) -> list[Path]:
    """Makes the directory; returns the new directories, innermost first."""
    missing = [each for each in (output, *output.absolute().parents) if not each.exists()]
    output.mkdir(parents=True, exist_ok=True)
    return missing


def _acquire(file: Path, output: Path) -> int:
    """Opens and locks the file that names the process at work."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _lock(descriptor, output)
            if _is_same(descriptor, file):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        # The previous process removed it between our opening and locking.
        os.close(descriptor)


def _lock(descriptor: int, output: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 300, 0).decode(errors="replace") or "another process"
        raise ValueError(
            f"--output {output} is in use by {holder}: wait for it, or choose another --output."
        ) from None
    except OSError as error:
        # Some network file systems have no locks; a run there proceeds without one.
        if error.errno not in _NO_LOCKS:
            raise


def _is_same(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _complaint(output: Path, error: OSError) -> str:
    return (
        f"--output {str(output)[:300]} cannot be written ({error.strerror}): choose a writable "
        "directory."
    )
