"""A GGUF file: a strict reader of its metadata, and dequantisation one tensor at a time.

`gguf.GGUFReader` makes several numpy views for each of the 262,144 strings, scores and types of
Gemma's vocabulary (23 s) and checks no length against the file, so the header (GGUF versions 2
and 3) is parsed here; the block formats are the `gguf` package's.
"""

import mmap
import struct
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from convert.errors import ConversionError
from convert.formats.gguf_parts import all_parts
from convert.formats.tensors import TensorInfo, empty_aligned, read_bytes

_SCALARS: Mapping[GGUFValueType, np.dtype] = {
    GGUFValueType.UINT8: np.dtype("u1"),
    GGUFValueType.INT8: np.dtype("i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.BOOL: np.dtype("?"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
}
_MAX_DIMENSIONS = 4
# Bounds the temporary memory of dequantisation, which is several times its result.
_ELEMENTS_AT_ONCE = 1 << 20


class _Cursor:
    """Reads the header sequentially, and never past the end of the file."""

    def __init__(self, data: mmap.mmap):
        self.data = data
        self.position = 0

    def take(self, length: int) -> int:
        """Consumes `length` bytes and returns their start."""
        begin = self.position
        if length > len(self.data) - begin:
            raise ConversionError(f"its header ends at byte {len(self.data)} of the file")
        self.position = begin + length
        return begin

    def number(self, code: str) -> int:
        return struct.unpack_from(f"<{code}", self.data, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        length = self.number("Q")
        begin = self.take(length)
        return self.data[begin : begin + length].decode("utf-8")

    def value(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind == GGUFValueType.ARRAY:
            return self.array()
        dtype = _SCALARS[kind]
        return np.frombuffer(self.data, dtype, 1, self.take(dtype.itemsize))[0].item()

    def array(self) -> list[Any]:
        kind, count = GGUFValueType(self.number("I")), self.number("Q")
        if kind in _SCALARS:
            dtype = _SCALARS[kind]
            begin = self.take(count * dtype.itemsize)
            return np.frombuffer(self.data, dtype, count, begin).tolist()
        # Every string takes at least eight bytes, so an absurd count soon hits the end.
        return [self.value(kind) for _ in range(count)]


class _Stored(NamedTuple):
    info: TensorInfo
    kind: GGMLQuantizationType
    offset: int
    path: Path = Path()


class _Header(NamedTuple):
    metadata: dict[str, Any]
    tensors: dict[str, _Stored]


class GgufFile:
    """A GGUF file, or all parts of one: its metadata, and its tensors on demand."""

    def __init__(self, path: Path):
        """Reads and checks the headers.

        Args:
          path: the file; for a model in several parts, any of them.

        Raises:
          ConversionError: if it is not a readable GGUF file, or is truncated, or a part is missing.
        """
        self.path = path
        if not path.is_file():
            raise ConversionError(f"no such file: {path}.")
        parts = all_parts(path)
        headers = [_read_file(part) for part in parts]
        self.metadata: dict[str, Any] = headers[0].metadata
        """Every key of the (first) file with its value; arrays are lists."""
        if len(parts) > 1 or self.metadata.get("split.count", 1) != 1:
            _check_parts(parts, headers)
        self._stored = {name: x for header in headers for name, x in header.tensors.items()}
        self._tensors = {name: stored.info for name, stored in self._stored.items()}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the file, by name, its shape in numpy's order."""
        return self._tensors

    def read(self, name: str) -> np.ndarray:
        """Reads and dequantises one tensor.

        Args:
          name: its name in the file.

        Returns:
          A new float32 array.

        Raises:
          ConversionError: if the `gguf` package cannot dequantise its type.
        """
        info, kind, offset, path = self._stored[name]
        raw = read_bytes(path, offset, info.nbytes, name)
        width = info.shape[-1] if info.shape else 1
        blocks = raw.reshape(prod(info.shape) // width, -1)
        result = empty_aligned((len(blocks), width), np.dtype(np.float32))
        step = max(1, _ELEMENTS_AT_ONCE // width)
        try:
            for begin in range(0, len(blocks), step):
                rows = slice(begin, begin + step)
                result[rows] = gguf.dequantize(blocks[rows], kind)
        except NotImplementedError:
            raise ConversionError(
                f"{name} in {path} has the type {info.dtype}, which the gguf package cannot "
                "dequantise; use another quantisation of the model."
            ) from None
        return result.reshape(info.shape)


def _read_file(path: Path) -> _Header:
    """The header of one file."""
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            metadata, tensors = _read_header(_Cursor(data))
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, OverflowError, RecursionError) as error:
        # Our own errors, and those of enums, UTF-8 and an empty file.
        raise ConversionError(f"{path} is not a readable GGUF file: {error}.") from None
    return _Header(metadata, {name: x._replace(path=path) for name, x in tensors.items()})


def _check_parts(parts: Sequence[Path], headers: Sequence[_Header]) -> None:
    """Raises ConversionError unless these are all parts of one model, in order."""
    seen: set[str] = set()
    for number, (path, header) in enumerate(zip(parts, headers, strict=True)):
        place = tuple(header.metadata.get(f"split.{key}") for key in ("no", "count"))
        if place != (number, len(parts)):
            raise ConversionError(
                f"{path} must be part {number + 1} of {len(parts)} by its name, but its split.no "
                f"and split.count are {place[0]!r:.99} and {place[1]!r:.99}: keep the names that "
                "llama.cpp gave the parts."
            )
        if twice := seen & header.tensors.keys():
            raise ConversionError(f"{path} has {min(twice)}, which another part also has.")
        seen |= header.tensors.keys()
    total = headers[0].metadata.get("split.tensors.count")
    if total != len(seen):
        raise ConversionError(
            f"the {len(parts)} parts of {parts[0]} have {len(seen)} tensors, but declare "
            f"{total!r:.99}: fetch them again."
        )


def _read_header(cursor: _Cursor) -> _Header:
    begin = cursor.take(4)
    if cursor.data[begin : begin + 4] != b"GGUF":
        raise ConversionError("it does not begin with GGUF")
    version = cursor.number("I")
    if version not in (2, 3):
        raise ConversionError(f"it has version {version}, supported: 2 and 3 (little-endian)")
    tensor_count, metadata_count = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(metadata_count):
        key = cursor.string()
        if key in metadata:
            raise ConversionError(f"it has the key {key} twice")
        metadata[key] = cursor.value(GGUFValueType(cursor.number("I")))
    entries: dict[str, _Stored] = {}
    for _ in range(tensor_count):
        name = cursor.string()
        if name in entries:
            raise ConversionError(f"it has the tensor {name} twice")
        entries[name] = _read_entry(cursor, name)
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ConversionError(f"its general.alignment is {alignment!r}")
    start = -(-cursor.position // alignment) * alignment
    return _Header(metadata, _place(entries, start, len(cursor.data)))


def _read_entry(cursor: _Cursor, name: str) -> _Stored:
    dimensions = cursor.number("I")
    if dimensions > _MAX_DIMENSIONS:
        raise ConversionError(f"its tensor {name} has {dimensions} axes")
    shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
    kind = GGMLQuantizationType(cursor.number("I"))
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if prod(shape) == 0 or (shape[-1] if shape else 1) % per_block:
        raise ConversionError(
            f"its tensor {name} has shape {list(shape)}, which {kind.name} cannot hold"
        )
    nbytes = prod(shape) // per_block * block_bytes
    return _Stored(TensorInfo(shape, kind.name, nbytes), kind, cursor.number("Q"))


def _place(entries: Mapping[str, _Stored], start: int, size: int) -> dict[str, _Stored]:
    """Turns offsets into positions in the file and checks that they lie inside, one by one."""
    placed: dict[str, _Stored] = {}
    end = start
    for name, entry in sorted(entries.items(), key=lambda item: item[1].offset):
        begin = start + entry.offset
        if begin < end:
            raise ConversionError(f"its tensor {name} overlaps the one before it")
        end = begin + entry.info.nbytes
        if end > size:
            raise ConversionError(
                f"it has {size} bytes but its tensor {name} ends at {end}; fetch it again"
            )
        placed[name] = entry._replace(offset=begin)
    return placed
