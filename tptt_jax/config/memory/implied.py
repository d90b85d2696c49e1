"""Values that one setting of a memory implies for others."""

from collections.abc import Mapping
from typing import Any


class _ImpliedText(str):
    """A choice implied by another setting; `dataclasses.replace` resolves it again."""

    __slots__ = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> str:
        """Copies are plain strings, as in `dataclasses.asdict` and in files."""
        return str(self)


class _ImpliedCount(int):
    """A number implied by another setting; see `_ImpliedText`."""

    __slots__ = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> int:
        """Copies are plain ints."""
        return int(self)


def fill_implied(config: Any, values: Mapping[str, str | int]) -> None:
    """Sets fields of a frozen configuration that are None or were implied before.

    Args:
      config: changed in place, while it is being made.
      values: by field. A field that was given this value counts as implied, too.
    """
    for name, value in values.items():
        given = getattr(config, name)
        if given is None or given == value or isinstance(given, (_ImpliedText, _ImpliedCount)):
            implied = _ImpliedText(value) if isinstance(value, str) else _ImpliedCount(value)
            object.__setattr__(config, name, implied)
