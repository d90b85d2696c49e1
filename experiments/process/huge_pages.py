"""Huge pages for the process's memory, where Linux grants them on request only."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

_TUNABLE = "glibc.malloc.hugetlb=1"
_SYSTEM = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart_with_huge_pages() -> None:
    """Starts `python -m experiments.X` again, once, with glibc asking for huge pages.

    XLA on CPU reallocates the temporaries of every step, and the kernel clears them page by page:
    with 4 KiB pages that takes a tenth of a training step and a third of the operator. glibc reads
    the setting only when a process starts. The process keeps its id, standard streams and
    arguments. An existing GLIBC_TUNABLES stays as it is.
    """
    environment = huge_page_environment(os.environ, _SYSTEM)
    if environment is None:
        return
    try:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    except OSError:
        return  # only speed is lost


def huge_page_environment(environment: Mapping[str, str], system: Path) -> dict[str, str] | None:
    """The environment for the restart; None if it would change nothing.

    Args:
      environment: of this process.
      system: the kernel's file with the policy for huge pages: "always [madvise] never".
    """
    if "GLIBC_TUNABLES" in environment or not sys.executable:
        return None
    try:
        if "[madvise]" not in system.read_text():
            return None
    except OSError:
        return None  # no Linux, or a kernel without them
    return {**environment, "GLIBC_TUNABLES": _TUNABLE}
