"""Ctrl-C and SIGTERM as a request that a loop honours between two steps."""

import os
import signal
import sys
from types import FrameType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def exit_on_interrupt() -> None:
    """Until a command has imported what it needs, Ctrl-C ends the process without a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit_while_importing)


def _exit_while_importing(number: int, frame: FrameType | None) -> None:
    # A command's module defines `main` after its imports.
    if hasattr(sys.modules["__main__"], "main"):
        raise KeyboardInterrupt
    os.write(2, b"interrupted\n")
    os._exit(128 + number)


class StopRequest:
    """While the context is open, the first signal only asks; a second one interrupts at once."""

    def __init__(self) -> None:
        """Nothing is asked yet."""
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Takes the signals over."""
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        """Gives the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
