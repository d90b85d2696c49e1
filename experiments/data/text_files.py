"""Opens text files: byte-order marks, gzip and Zstandard, and errors that name a line."""

import codecs
import gzip
import importlib.util
import io
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

COMPRESSIONS = (".gz", ".zst")
"""Extensions of compressed files."""

# The marks of UTF-32 begin with those of UTF-16.
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_PIECE = 1 << 20
_BLOCK = 64_000


def text_suffix(path: Path) -> str:
    """The extension in lower case, without the one that compression adds."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSIONS else suffix


@contextmanager
def open_text(path: Path, *, newline: str | None = None) -> Iterator[TextIO]:
    """Opens a text file in UTF-8, or in the encoding of its byte-order mark; .gz and .zst too.

    Errors during reading also become one line.

    Args:
      path: of the file.
      newline: as `open` takes it.

    Raises:
      ValueError: if it is damaged or not such text; the message names the line.
    """
    try:
        with (
            _open_bytes(path) as stream,
            io.TextIOWrapper(stream, encoding=_encoding(stream, path), newline=newline) as text,
        ):
            yield text
    except UnicodeDecodeError as error:
        line = _faulty_line(path, error.encoding)
        expected = error.encoding.upper()
        raise ValueError(
            f"{path}, line {line}, is not {expected} text ({error.reason}): convert the file to "
            "UTF-8."
        ) from None
    except _damages() as error:
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"{path} is not valid {path.suffix.lower()} data ({reason}): compress it again."
        ) from None


def text_blocks(lines: Iterable[str]) -> Iterator[str]:
    """Joins lines to blocks of about 64,000 characters; a longer line is a block of its own."""
    block, size = [], 0
    for line in lines:
        block.append(line)
        size += len(line)
        if size >= _BLOCK:
            yield "".join(block)
            block, size = [], 0
    if block:
        yield "".join(block)


def _damages() -> tuple[type[Exception], ...]:
    return (gzip.BadGzipFile, zlib.error, EOFError, _DamagedError)


class _DamagedError(Exception):
    """Of a .zst file."""


def _open_bytes(path: Path) -> Any:
    """A buffered stream of a file's decompressed bytes."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return io.BufferedReader(gzip.open(path))  # type: ignore[arg-type]
    if suffix == ".zst":
        return io.BufferedReader(_ZstdFile(path))
    return path.open("rb")


class _ZstdFile(io.RawIOBase):
    """A stream that pyarrow, or else the package zstandard, decompresses."""

    def __init__(self, path: Path) -> None:
        self._stream: Any = _zstd_stream(path)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except Exception as error:  # of the library's own class
            raise _DamagedError(str(error)) from None
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


def _zstd_stream(path: Path) -> Any:
    if importlib.util.find_spec("pyarrow"):
        import pyarrow as pa

        if pa.Codec.is_available("zstd"):
            return pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")
    if importlib.util.find_spec("zstandard"):
        import zstandard  # pyright: ignore[reportMissingImports]

        return zstandard.open(path, "rb")
    raise ValueError(
        f"{path} needs a library for Zstandard, and none is installed: pip install zstandard, or "
        "decompress the file."
    )


def _encoding(stream: io.BufferedReader, path: Path) -> str:
    head = stream.peek(4)[:4]
    for mark, encoding in _MARKS.items():
        if head.startswith(mark):
            return encoding
    if b"\0" in head[:2]:
        raise ValueError(
            f"{path} is not UTF-8 text: it holds zero bytes, like binary files and UTF-16 without "
            "a byte-order mark; convert it to UTF-8."
        )
    return "utf-8"


def _faulty_line(path: Path, encoding: str) -> int:
    """The number of the line that cannot be decoded, counted from 1."""
    line, decoder = 1, codecs.getincrementaldecoder(encoding)()
    with _open_bytes(path) as stream:
        while piece := stream.read(_PIECE):
            try:
                line += decoder.decode(piece).count("\n")
            except UnicodeDecodeError as error:
                return line + error.object[: error.start].decode(encoding, "replace").count("\n")
    return line
