"""Turns Ctrl-C and SIGTERM into a request to stop between two steps."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TerminationError(KeyboardInterrupt):
    """Raised by SIGTERM, which job schedulers send; its text says what was done last."""


@contextlib.contextmanager
def termination_raises() -> Iterator[None]:
    """Inside the context SIGTERM raises `TerminationError`, where no `StopRequest` takes it.

    Python delivers signals to the main thread only; in another one this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TerminationError("stopped between the stages")

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class StopRequest:
    """Inside the context the first signal requests a stop; a second one interrupts at once."""

    def __init__(self) -> None:
        """Starts without a request."""
        self.requested = False
        self.is_termination = False
        """Whether SIGTERM requested it."""
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Installs the signal handlers."""
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        """Restores the previous signal handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self.is_termination = number == signal.SIGTERM
