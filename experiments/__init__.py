"""Command modules (fine-tune, generate, evaluate, bench, ...), and a package for each subject.

What a command changes about its process it changes here, before its imports, and never on import.
"""

import os
import sys

from experiments.process.garbage import collect_seldom
from experiments.process.huge_pages import restart_with_huge_pages
from experiments.process.interrupts import exit_on_interrupt


def _is_command() -> bool:
    """Whether Python runs one of our modules by `python -m`, rather than importing it."""
    if sys.argv[:1] != ["-m"]:
        return False
    count = len(sys.orig_argv) - len(sys.argv[1:])
    return sys.orig_argv[count - 1].removeprefix("-m").partition(".")[0] == "experiments"


def _is_script() -> bool:
    """Whether this is the script `tptt-jax`, which starts a command as a new program."""
    return os.path.basename(sys.argv[0] if sys.argv else "") in ("tptt-jax", "tptt-jax.exe")


if _is_script():
    exit_on_interrupt()
if _is_command():
    exit_on_interrupt()
    restart_with_huge_pages()
    collect_seldom()
