"""Whether arguments are arrays, and of how many axes; errors say what was expected."""

from typing import Any

import jax
import numpy as np


def check_arrays(**arguments: Any) -> None:
    """Raises TypeError if an argument is not an array; None is left out.

    Lists are refused too: JAX would trace each of their numbers.

    Args:
      **arguments: by name.
    """
    for name, value in arguments.items():
        if value is not None and not isinstance(value, jax.Array | np.ndarray):
            raise TypeError(
                f"{name} must be an array, got {type(value).__name__}: convert it with "
                "jax.numpy.asarray."
            )


def check_axes(name: str, x: Any, axes: str) -> None:
    """Raises if an argument is not an array, or lacks these axes.

    Args:
      name: of the argument.
      x: the argument.
      axes: their letters, as in "B T K D"; "B T ..." allows any number after the first two.

    Raises:
      TypeError: if it is not an array.
      ValueError: if it has another number of axes.
    """
    if x is None:
        raise TypeError(f"{name} must be an array, got None.")
    check_arrays(**{name: x})
    letters = axes.split()
    is_open = letters[-1] == "..."
    needed = len(letters) - is_open
    if x.ndim < needed or (x.ndim > needed and not is_open):
        least = "at least " if is_open else ""
        plural = "es" if needed > 1 else "is"
        shown = ", ".join(letters)
        raise ValueError(
            f"{name} must have {least}{needed} ax{plural} ([{shown}]), got shape {x.shape}."
        )
