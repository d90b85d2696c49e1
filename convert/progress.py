"""Progress bars on a terminal's stderr; off unless a command enables them."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")

_shown: ContextVar[Progress | None] = ContextVar("progress bars of this command", default=None)


@contextlib.contextmanager
def progress_bars(*, enabled: bool) -> Iterator[None]:
    """Shows the bars of every `track` inside the block, if stderr is a terminal.

    Args:
      enabled: False shows none.
    """
    console = Console(stderr=True)
    if not (enabled and console.is_terminal):
        yield
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    # Transient, so that only the result or the error line remains.
    with Progress(*columns, console=console, transient=True) as progress:
        token = _shown.set(progress)
        try:
            yield
        finally:
            _shown.reset(token)


def track(
    items: Sequence[Item], description: str, weights: Iterable[float] | None = None
) -> Iterator[Item]:
    """Yields the items, and advances a bar after each if bars are shown.

    Args:
      items: the items.
      description: text of the bar.
      weights: amount of work per item; None: all equal.

    Yields:
      Each item.
    """
    progress = _shown.get()
    if progress is None:
        yield from items
        return
    steps = [1.0] * len(items) if weights is None else list(weights)
    task = progress.add_task(description, total=sum(steps))
    for item, step in zip(items, steps, strict=True):
        yield item
        progress.advance(task, step)
    progress.remove_task(task)
