"""Prepares the batches of the next steps in a thread while the device computes."""

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, Self, TypeVar

_Item = TypeVar("_Item")

# One that waits, and one that is being made: a device holds few batches besides the step's own.
_DEPTH = 2
_POLL_SECONDS = 0.1
# Enough for any batch; only a chat template takes longer.
_LAST_SECONDS = 10.0


class Prefetched(NamedTuple, Generic[_Item]):
    """An item, and for how many seconds the caller had to wait for it."""

    item: _Item
    waited: float


class Prefetch(Generic[_Item]):
    """Calls a function for consecutive numbers in one thread; use as a context manager.

    It is called in order and never twice at the same time. Its exceptions are raised by `get`.
    """

    def __init__(self, make: Callable[[int], _Item], first: int, end: int) -> None:
        """Prepares to call `make` with `first` to `end` - 1."""
        self._make = make
        self._numbers = range(first, end)
        self._made: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(_DEPTH - 1)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)

    def __enter__(self) -> Self:
        """Starts the thread."""
        self._thread.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Ends the thread once its present call has returned; after an error nobody waits long."""
        self._is_over.set()
        self._thread.join(None if error is None else _LAST_SECONDS)

    def get(self) -> Prefetched[_Item]:
        """The next item, when it is there."""
        start = time.perf_counter()
        item, error = self._made.get()
        if error is not None:
            raise error
        return Prefetched(item, time.perf_counter() - start)

    def _run(self) -> None:
        for number in self._numbers:
            try:
                made: tuple[Any, BaseException | None] = (self._make(number), None)
            except BaseException as error:
                made = (None, error)
            self._put_result(made)
            if self._is_over.is_set() or made[1] is not None:
                return

    def _put_result(self, made: tuple[Any, BaseException | None]) -> None:
        while not self._is_over.is_set():
            try:
                self._made.put(made, timeout=_POLL_SECONDS)
                return
            except queue.Full:
                continue
