"""Ctrl-C while `python -m convert` is importing what it needs."""

import os
import signal
import sys
from types import FrameType


def is_command() -> bool:
    """Whether Python is looking for a module of ours that `python -m` names: nobody imports."""
    if sys.argv[:1] != ["-m"]:
        return False
    count = len(sys.orig_argv) - len(sys.argv[1:])
    return sys.orig_argv[count - 1].removeprefix("-m").partition(".")[0] == "convert"


# `experiments.process.interrupts` does the same: to import this from there takes all of `convert`.
def exit_on_interrupt() -> None:
    """Until the command has imported what it needs, Ctrl-C ends it without a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit_while_importing)


def _exit_while_importing(number: int, frame: FrameType | None) -> None:
    # The command's module defines `main` after its imports.
    if hasattr(sys.modules["__main__"], "main"):
        raise KeyboardInterrupt
    os.write(2, b"interrupted\n")
    os._exit(128 + number)
