"""Command modules on top (fine-tune, generate, evaluate, bench, ...), rooms by subject below them.

What a command changes about its process it changes here, before its imports, and never on import.
"""

import os
import sys

from experiments.process.garbage import collect_seldom
from experiments.process.huge_pages import restart_with_huge_pages
from experiments.process.interrupts import exit_on_interrupt


def _is_command() -> bool:
    """Whether Python is looking for a module of ours that `python -m` names: nobody imports."""
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
