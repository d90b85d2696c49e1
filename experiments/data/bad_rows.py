"""Rows of data that cannot be read: an error at once, or left out, counted and named."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from experiments.data.templates import FatalTemplateError

Value = TypeVar("Value")

# This many bad rows without a good one mean a wrong format, not bad rows.
_MOST_IN_VAIN = 100


@dataclass(kw_only=True)
class BadRows:
    """Collects what is wrong with rows."""

    strict: bool = True
    """Whether the first bad row is an error."""
    messages: list[str] = field(default_factory=list)
    """A line for each bad row, which names it."""
    _num_good: int = 0

    def read(self, make: Callable[[], Value]) -> Value | None:
        """What `make` returns for a row; None if the row is left out.

        Args:
          make: raises ValueError, which names the row, if it is bad.

        Raises:
          ValueError: if bad rows are errors, or no row is good.
          FatalTemplateError: as `make`; the next rows would fail in the same way.
        """
        try:
            value = make()
        except FatalTemplateError:
            raise
        except ValueError as error:
            in_vain = not self._num_good and len(self.messages) >= _MOST_IN_VAIN
            if self.strict or in_vain:
                raise
            self.messages.append(str(error))
            return None
        self._num_good += 1
        return value

    def check_any_good(self) -> None:
        """Raises the first bad row's error if no row is good."""
        if self.messages and not self._num_good:
            raise ValueError(self.messages[0])
