"""TensorBoard's event files: scalars by step, in TFRecord frames of protocol buffers.

The formats: tensorflow/core/util/event.proto, tensorflow/core/framework/summary.proto and
tensorflow/core/lib/io/record_writer.h of TensorFlow.
"""

import functools
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from convert.formats.files import check_regular
from tptt_jax.durable import atomic_file

_PATTERN = "events.out.tfevents.*.tptt_jax"
_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")
_LARGEST = 3.4028234663852886e38
_POLYNOMIAL = 0x82F63B78  # of CRC-32C (Castagnoli), bits reversed


class EventFile:
    """A `Tracker` that writes scalars for TensorBoard.

    Every step is in the file when `log` returns. A resumed run drops an earlier process's later
    steps, so that each is there once.
    """

    def __init__(self, folder: Path, *, resume_step: int = 0) -> None:
        """Opens a new file in a folder, and keeps steps up to `resume_step` of ours in it."""
        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.glob(_PATTERN):
            check_regular(file)
            _keep_until(file, resume_step)
        stamp = time.time_ns()
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{stamp // 10**9}.{stamp % 10**9:09}.{socket.gethostname()}"
        self._stream: IO[bytes] = (folder / f"{name}.tptt_jax").open("xb")
        self._write(_bytes_field(3, b"brain.Event:2"))
        if resume_step:
            # A TensorBoard that is running forgets the later steps that it has read.
            session_start = _bytes_field(7, _varint_field(1, 1))
            self._write(_varint_field(2, resume_step + 1) + session_start)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends the metrics of a step."""
        values = b"".join(
            _bytes_field(1, _bytes_field(1, name.encode()) + b"\x15" + _float32(value))
            for name, value in metrics.items()
        )
        self._write(_varint_field(2, step) + _bytes_field(5, values))

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()

    def _write(self, fields: bytes) -> None:
        self._stream.write(_frame(b"\x09" + struct.pack("<d", time.time()) + fields))
        self._stream.flush()


def _keep_until(file: Path, step: int) -> None:
    """Drops later steps from an earlier file, an incomplete end too; removes it if none is left."""
    kept = [event for event in read_frames(file.read_bytes()) if 0 < _step_of(event) <= step]
    if not kept:
        file.unlink()
        return
    version = b"\x09" + struct.pack("<d", 0.0) + _bytes_field(3, b"brain.Event:2")
    with atomic_file(file) as temporary:
        temporary.write_bytes(b"".join(map(_frame, [version, *kept])))


def read_frames(data: bytes) -> Iterator[bytes]:
    """The records of a TFRecord file, up to the first one that is incomplete or damaged."""
    place = 0
    while place + _HEADER.size <= len(data):
        length, check = _HEADER.unpack_from(data, place)
        start = place + _HEADER.size
        place = start + length + _FOOTER.size
        if check != _masked_crc(data[start - 12 : start - 4]) or place > len(data):
            return
        record = data[start : start + length]
        if _FOOTER.unpack_from(data, start + length)[0] != _masked_crc(record):
            return
        yield record


def _step_of(event: bytes) -> int:
    """Field 2 of an event as `EventFile` writes it, after the nine bytes of its time; 0: none."""
    if event[9:10] != b"\x10":
        return 0
    step = 0
    for number, byte in enumerate(event[10:20]):
        step |= (byte & 0x7F) << (7 * number)
        if byte < 0x80:
            break
    return step


def _frame(record: bytes) -> bytes:
    length = struct.pack("<Q", len(record))
    head = length + _FOOTER.pack(_masked_crc(length))
    return head + record + _FOOTER.pack(_masked_crc(record))


def _varint_field(number: int, value: int) -> bytes:
    return bytes([number << 3]) + _varint(value)


def _bytes_field(number: int, value: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _varint(len(value)) + value


def _float32(value: float) -> bytes:
    """Of the nearest finite number of that type."""
    return struct.pack("<f", min(max(value, -_LARGEST), _LARGEST))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _masked_crc(data: bytes) -> int:
    crc, table = 0xFFFFFFFF, _crc_table()
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@functools.cache
def _crc_table() -> tuple[int, ...]:
    def entry(value: int) -> int:
        for _ in range(8):
            value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
        return value

    return tuple(map(entry, range(256)))
