"""One safetensors file: a strict reader and a streaming writer, without torch.

`safetensors.safe_open(framework="numpy")` cannot hand out bfloat16 and serialises whole
dictionaries, so the format (https://huggingface.co/docs/safetensors) is read and written here.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from convert.errors import ConversionError
from convert.formats.files import check_regular, parse_json
from convert.formats.tensors import TensorInfo, read_bytes
from tptt_jax.durable import atomic_file

_MAX_HEADER_BYTES = 100_000_000
_REMEDY = "fetch the file again"
_MAX_AXES = 16
_ELEMENTS_AT_ONCE = 1 << 20

FLOAT_TYPES: Mapping[str, np.dtype] = MappingProxyType(
    {
        "F64": np.dtype(np.float64),
        "F32": np.dtype(np.float32),
        "F16": np.dtype(np.float16),
        "BF16": np.dtype(ml_dtypes.bfloat16),
    }
)
_OTHER_TYPE_BYTES = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2},
    **{"U32": 4, "I32": 4, "U64": 8, "I64": 8},
}


def _bytes_per_element(dtype: str) -> int | None:
    return FLOAT_TYPES[dtype].itemsize if dtype in FLOAT_TYPES else _OTHER_TYPE_BYTES.get(dtype)


class _Entry(NamedTuple):
    info: TensorInfo
    begin: int


class SafetensorsFile:
    """A safetensors file with a checked header; weights are read on demand.

    Reads use the file and not a memory map, so memory holds only the current tensor.
    """

    def __init__(self, path: Path):
        """Reads and checks the header.

        Args:
          path: the file.

        Raises:
          ConversionError: if the file is truncated, or its header is malformed, too large or
            disagrees with the data (unknown type, wrong length, gaps or overlaps, duplicates).
        """
        self.path = path
        check_regular(path)
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                header, data_start = _read_header(file, size, path)
        except OSError as error:
            raise ConversionError(f"{path} cannot be read: {error.strerror}.") from None
        header.pop("__metadata__", None)
        entries = {name: _check_entry(path, name, value) for name, value in header.items()}
        _check_layout(path, entries, size - data_start)
        self._offsets = {name: data_start + entry.begin for name, entry in entries.items()}
        self._tensors = {name: entry.info for name, entry in entries.items()}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the file, by name."""
        return self._tensors

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor.

        Args:
          name: its name in the file.

        Returns:
          A new array in float64, float32, float16 or bfloat16.

        Raises:
          ConversionError: if the tensor does not hold floating-point numbers of 16 bits or
            more, or the file has been truncated since.
        """
        info = self._tensors[name]
        if info.dtype not in FLOAT_TYPES:
            raise ConversionError(
                f"{name} in {self.path} has type {info.dtype}; weights must be one of "
                f"{', '.join(FLOAT_TYPES)}, so use the checkpoint that was not quantised."
            )
        raw = read_bytes(self.path, self._offsets[name], info.nbytes, name)
        return raw.view(FLOAT_TYPES[info.dtype]).reshape(info.shape)


def _read_header(file: BinaryIO, size: int, path: Path) -> tuple[dict[str, Any], int]:
    prefix = file.read(8)
    if len(prefix) < 8:
        raise ConversionError(
            f"{path} has {size} bytes, too few for a safetensors file; fetch it again."
        )
    length = int.from_bytes(prefix, "little")
    if length > _MAX_HEADER_BYTES:
        raise ConversionError(
            f"{path} claims a header of {length} bytes (at most {_MAX_HEADER_BYTES} are allowed); "
            "it is not a safetensors file."
        )
    if length > size - 8:
        raise ConversionError(
            f"{path} claims a header of {length} bytes but has {size} bytes in all; it is "
            "truncated, fetch it again."
        )
    try:
        text = file.read(length).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConversionError(
            f"{path} has a header that is not JSON ({error}): {_REMEDY}."
        ) from None
    header = parse_json(text, path, "has a header that is not JSON")
    if not isinstance(header, dict):
        raise ConversionError(f"{path} has a header that is not a JSON object: {_REMEDY}.")
    return header, 8 + length


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _check_entry(path: Path, name: str, value: Any) -> _Entry:
    """Parses one header entry; errors say what is wrong with it."""
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise ConversionError(
            f"{name} in {path} must have dtype, shape and data_offsets, it has {value!r:.200}."
        )
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    width = _bytes_per_element(dtype) if isinstance(dtype, str) else None
    if width is None:
        raise ConversionError(f"{name} in {path} has an unknown type {dtype!r:.100}: {_REMEDY}.")
    if not isinstance(shape, list) or len(shape) > _MAX_AXES or not all(map(_is_size, shape)):
        raise ConversionError(
            f"{name} in {path} has an impossible shape {shape!r:.100}: {_REMEDY}."
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise ConversionError(
            f"{name} in {path} has impossible offsets {offsets!r:.100}: {_REMEDY}."
        )
    begin, end = offsets
    nbytes = prod(shape) * width
    if end - begin != nbytes:
        raise ConversionError(
            f"{name} in {path} needs {nbytes} bytes ({dtype} {shape}) but its offsets "
            f"{offsets} span {end - begin}: {_REMEDY}."
        )
    return _Entry(TensorInfo(tuple(shape), dtype, nbytes), begin)


def _check_layout(path: Path, entries: Mapping[str, _Entry], data_bytes: int) -> None:
    """Raises unless entries cover the data exactly: no overlap, no gap, nothing outside."""
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].info)):
        if entry.begin != position:
            kind = "overlaps the tensor before it" if entry.begin < position else "leaves a gap"
            raise ConversionError(
                f"{name} in {path} {kind} at byte {entry.begin} of the data: {_REMEDY}."
            )
        position += entry.info.nbytes
    if position != data_bytes:
        raise ConversionError(
            f"{path} holds {data_bytes} bytes of data where its header describes {position}; "
            "it is damaged or truncated, fetch it again."
        )


class TensorSpec(NamedTuple):
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * self.dtype.itemsize


def _header(specs: Sequence[TensorSpec]) -> bytes:
    names = {dtype: name for name, dtype in FLOAT_TYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": names[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        position += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    # Readers map the data in place, so it must start at a multiple of eight.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(
    path: Path, specs: Sequence[TensorSpec], arrays: Iterable[np.ndarray]
) -> None:
    """Writes a file tensor by tensor; it appears under its name only when complete.

    Args:
      path: the file to write.
      specs: all tensors, before the first one is computed.
      arrays: the tensors in the order of `specs`, as many as there are specs.

    Raises:
      ValueError: if the arrays are not what the specs announced.
    """
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        file.write(_header(specs))
        for spec, array in zip(specs, arrays, strict=True):
            if array.shape != spec.shape or array.dtype != spec.dtype:
                raise ValueError(
                    f"{spec.name} was announced as {spec.dtype} {spec.shape}, "
                    f"got {array.dtype} {array.shape}."
                )
            _write_array(file, array)
        file.flush()
        os.fsync(file.fileno())


def _write_array(file: BinaryIO, array: np.ndarray) -> None:
    """Writes part by part, so a non-contiguous array, e.g. a transposed head, is not copied."""
    rows = array.reshape(1) if array.ndim == 0 else array
    step = max(1, _ELEMENTS_AT_ONCE // max(1, prod(rows.shape[1:])))
    for begin in range(0, len(rows), step):
        part = np.ascontiguousarray(rows[begin : begin + step])
        file.write(part.reshape(-1).view(np.uint8).data)
