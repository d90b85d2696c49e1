"""A check against NaN and infinite values before writing."""

from collections.abc import Iterable, Iterator, Sequence
from math import prod

import numpy as np

from convert.errors import ConversionError
from convert.formats.safetensors_io import TensorSpec

_ELEMENTS_AT_ONCE = 1 << 20
_MAX_NAMED = 20


def check_finite(specs: Sequence[TensorSpec], arrays: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yields tensors unchanged, and raises before the last one if any is not finite.

    It does not raise at the first, so that the error names all; the writer must discard its output
    when this raises.

    Args:
      specs: names of the tensors.
      arrays: the tensors, in the order of `specs`.

    Yields:
      The arrays as they are.

    Raises:
      ConversionError: naming every tensor with NaN or infinite values, and how many it has.
    """
    found: list[str] = []
    for number, (spec, array) in enumerate(zip(specs, arrays, strict=True), 1):
        if count := _count_invalid(array):
            found.append(f"{spec.name} ({count} of {array.size} values)")
        if found and number == len(specs):
            # Raise before the last: a writer of shards requests no more than it announced.
            raise _refusal(found)
        yield array


def _refusal(found: Sequence[str]) -> ConversionError:
    more = "" if len(found) <= _MAX_NAMED else f" and {len(found) - _MAX_NAMED} more tensors"
    return ConversionError(
        "The model holds NaN or infinite values (or too large ones for the chosen dtype) in "
        f"{', '.join(found[:_MAX_NAMED])}{more}; nothing was written: export an earlier "
        "checkpoint, or choose another dtype."
    )


def _count_invalid(array: np.ndarray) -> int:
    """Counts invalid values part by part: the mask of a whole embedding would be large."""
    rows = array.reshape(1) if array.ndim == 0 else array
    step = max(1, _ELEMENTS_AT_ONCE // max(1, prod(rows.shape[1:])))
    parts = (rows[begin : begin + step] for begin in range(0, len(rows), step))
    return sum(part.size - int(np.count_nonzero(np.isfinite(part))) for part in parts)
