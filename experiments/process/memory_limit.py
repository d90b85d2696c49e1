"""A bound on the memory that somebody else's code may ask for."""

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

_SIZES = Path("/proc/self/statm")


@contextlib.contextmanager
def limited_memory(extra: int) -> Iterator[None]:
    """Within the context the process's address space grows by `extra` bytes at most.

    What asks for more gets MemoryError, where the kernel would end the process later on. Systems
    that do not say how large a process is have no bound.

    Args:
      extra: bytes that the code may ask for. The bound is that of the whole process, so the code
        must be all that runs there, as in the process of chat templates.
    """
    size = _address_space()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    is_bounded = any(0 <= limit < (size or 0) + extra for limit in (soft, hard))
    if size is None or is_bounded:
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (size + extra, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space() -> int | None:
    """Bytes; None: this is no Linux."""
    try:
        pages = int(_SIZES.read_bytes().split()[0])
    except (OSError, ValueError, IndexError):
        return None
    return pages * resource.getpagesize()
