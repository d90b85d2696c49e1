"""Ctrl-C while a command is importing what it needs."""

import os
import signal
import sys
from types import FrameType


def exit_on_interrupt() -> None:
    """Makes Ctrl-C end the process without a traceback while a command imports its modules.

    Once the command's module has defined `main`, which it does after its imports, Ctrl-C raises
    KeyboardInterrupt as usual.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit_while_importing)


def _exit_while_importing(number: int, frame: FrameType | None) -> None:
    if hasattr(sys.modules["__main__"], "main"):
        raise KeyboardInterrupt
    os.write(2, b"interrupted\n")
    os._exit(128 + number)
