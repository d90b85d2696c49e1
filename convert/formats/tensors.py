"""The interface of checkpoint formats to the rest of the package."""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from convert.errors import ConversionError

_ALIGNMENT = 64


class TensorInfo(NamedTuple):
    """One stored tensor, as its file describes it."""

    shape: tuple[int, ...]
    dtype: str
    """The format's name of the type, e.g. "BF16" or "Q5_0"."""
    nbytes: int
    """Bytes in the file."""


class TensorSource(Protocol):
    """A checkpoint whose tensors are read one at a time."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the checkpoint, by name; reading this reads no weights."""
        ...

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor into a new floating-point array."""
        ...


def empty_aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array whose memory JAX on a CPU adopts without a copy.

    NumPy aligns to 16 bytes, XLA needs 64.
    """
    nbytes = prod(shape) * dtype.itemsize
    memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % _ALIGNMENT
    return memory[begin : begin + nbytes].view(dtype).reshape(shape)


def read_bytes(path: Path, offset: int, nbytes: int, name: str) -> np.ndarray:
    """Reads a part of a file into new aligned memory, without a memory map.

    Args:
      path: the file.
      offset: where the part begins.
      nbytes: its length.
      name: the tensor, for the error message.

    Returns:
      uint8 [nbytes].

    Raises:
      ConversionError: if the file ends before the part does.
    """
    raw = empty_aligned((nbytes,), np.dtype(np.uint8))
    with path.open("rb") as file:
        file.seek(offset)
        if file.readinto(raw.data) != nbytes:
            raise ConversionError(f"{path} ends inside {name}; fetch the file again.")
    return raw
