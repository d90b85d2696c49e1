"""Checks the array annotations of the library whenever a test calls it."""

import typing
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import beartype


def check_arrays(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that refuses arrays of another shape or dtype than its annotations say.

    Annotations that are no arrays are pyright's business.
    """
    hints = function.__annotations__
    function.__annotations__ = {name: x for name, x in hints.items() if _describes_arrays(x)}
    return beartype(function)


def _describes_arrays(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(map(_describes_arrays, typing.get_args(hint)))
