"""What every checkpoint format looks like to the rest of the package."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np


class TensorInfo(NamedTuple):
    """One stored tensor, as its file describes it."""

    shape: tuple[int, ...]
    dtype: str
    """The format's own name of the type, e.g. "BF16" or "Q5_0"."""
    nbytes: int
    """Bytes in the file."""


class TensorSource(Protocol):
    """A checkpoint whose tensors are read one at a time."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the checkpoint, by name; reading this reads no weights."""
        ...

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor into memory of its own, as a floating-point array."""
        ...
