"""Checks the array annotations of the library whenever a test calls it."""

import functools
import operator
import types
import typing
from collections.abc import Callable
from typing import Any

import jax
import jaxtyping
import numpy as np
from beartype import beartype


def check_arrays(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that refuses arrays of another shape or dtype than its annotations say.

    Annotations that are no arrays are pyright's business. NumPy's arrays will do for JAX's.
    """
    hints = function.__annotations__
    function.__annotations__ = {n: _widen(x) for n, x in hints.items() if _describes_arrays(x)}
    return beartype(function)


def _is_array(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)


def _describes_arrays(hint: Any) -> bool:
    return _is_array(hint) or any(map(_describes_arrays, typing.get_args(hint)))


def _widen(hint: Any) -> Any:
    if _is_array(hint):
        return hint.dtype[jax.Array | np.ndarray, hint.dim_str]
    parts = typing.get_args(hint)
    if not parts or not _describes_arrays(hint):
        return hint
    parts = tuple(map(_widen, parts))
    if isinstance(hint, types.UnionType):
        return functools.reduce(operator.or_, parts)
    return typing.get_origin(hint)[parts]
