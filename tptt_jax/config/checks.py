"""Checks that configurations share."""

import math
from typing import Any, get_args

MAX_RANK = 1 << 16
"""Upper bound of ranks and counts: no weight is wider."""


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raises ValueError unless `value` is one of the options of a Literal."""
    options = get_args(choices)
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(options)}, got {value!r}.")


def is_int32(value: Any) -> bool:
    """Whether a value is a whole number that an int32 holds."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31


def check_at_least(config: Any, minimum: int, *names: str, part: str = "") -> None:
    """Raises ValueError if one of these fields is neither None nor an integer >= minimum.

    Args:
      config: any configuration.
      minimum: of each field.
      *names: of the fields.
      part: what errors put before the names, e.g. "experts ".
    """
    for name in names:
        value = getattr(config, name)
        if value is None:
            continue
        if not is_int32(value):
            raise ValueError(f"{part}{name} must be an integer below 2**31, got {value!r:.99}.")
        if value < minimum:
            raise ValueError(f"{part}{name} must be at least {minimum}, got {value}.")


def check_at_most(config: Any, maximum: int, *names: str, part: str = "") -> None:
    """Raises ValueError if one of these fields is above maximum; `part` as in `check_at_least`."""
    for name in names:
        value = getattr(config, name)
        if value > maximum:
            raise ValueError(f"{part}{name} must be at most {maximum}, got {value}.")


def check_positive(config: Any, *names: str, part: str = "") -> None:
    """Raises ValueError if one of these fields is neither None nor positive and finite."""
    for name in names:
        value = getattr(config, name)
        # A negative width under the root of a query's scale makes a complex one.
        if value is not None and (isinstance(value, complex) or not 0 < value < math.inf):
            raise ValueError(f"{part}{name} must be positive or None, got {value}.")
