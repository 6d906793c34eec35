"""A file of text in pieces: unpacked and decoded as it is read, so that its size does not matter."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mergelab.checkpoints.text_file import POINTER_BYTES, refuse_pointer
from mergelab.errors import CorpusError, DependencyError, shortened

__all__ = ["data_package", "file_head", "open_unpacked", "text_lines", "text_pieces"]

_PIECE = 1 << 20
_LONGEST_LINE = 1 << 28
"""Characters of a line of JSON, at most: what has no end would fill the memory."""

_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_ARCHIVES = {b"PK\x03\x04": "a zip archive", b"7z\xbc\xaf": "a 7z archive", b"Rar!": "a rar archive"}
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # begins as UTF-16's mark does
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def data_package(name: str, what: str) -> Any:
    """An optional package that reads data.

    Raises:
        DependencyError: it is missing.
    """
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise DependencyError(
            f"{what} needs the package {package} ({error}); install it with `pip install {package}`, or "
            "all that reads data with `pip install 'mergelab[data]'`"
        ) from None


def _open(path: Path) -> IO[bytes]:
    place = shortened(str(path), 200)
    try:
        # Without O_NONBLOCK, opening a pipe waits until someone writes to it.
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise CorpusError(f"{place} cannot be read: it does not exist; check the path") from None
    except (OSError, ValueError) as failure:
        reason = failure.strerror if isinstance(failure, OSError) else "its name is not a file name"
        raise CorpusError(f"{place} cannot be read ({reason})") from None
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise CorpusError(f"{place} cannot be read: it is not a regular file; give one")
    return open(number, "rb")


@contextlib.contextmanager
def open_unpacked(path: Path) -> Iterator[IO[bytes]]:
    """A file's bytes, unpacked where it begins as gzip, bzip2, xz or zstd files do, whatever its name.

    Raises:
        CorpusError: it cannot be read, is a Git LFS pointer or an archive of several files, or is damaged.
        DependencyError: it is a zstd file, and the package for that is missing.
    """
    with _open(path) as file, reading(path):
        start = file.read(POINTER_BYTES)
        refuse_pointer(start, str(path))
        file.seek(0)
        for magic, what in _ARCHIVES.items():
            if start.startswith(magic):
                raise CorpusError(f"{path} is {what}, not a text; unpack it, and name the files in it")
        kind = next((kind for magic, kind in _PACKED.items() if start.startswith(magic)), None)
        if kind is None:
            yield file
        else:
            with _unpacked(file, kind, path) as stream:
                yield stream


def _unpacked(file: IO[bytes], kind: str, path: Path) -> Any:
    if kind == "gzip":
        return gzip.GzipFile(fileobj=file)
    if kind == "bzip2":
        return bz2.BZ2File(file)
    if kind == "xz":
        return lzma.LZMAFile(file)
    package = data_package("zstandard", f"{path}, which is packed by zstd,")
    return io.BufferedReader(_Zstd(file, package.ZstdDecompressor()), _PIECE)


class _Zstd(io.RawIOBase):
    """The content of zstd frames; unlike the package's own reader it misses the end of a cut file."""

    def __init__(self, file: IO[bytes], unpacker: Any) -> None:
        self._file, self._unpacker = file, unpacker
        self._frame: Any = None
        self._packed = self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._packed = self._packed or self._file.read(_PIECE // 8)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("it ends within a frame")
                return 0
            self._frame = self._frame or self._unpacker.decompressobj()
            self._ready, self._packed = self._frame.decompress(self._packed), b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what the system or an unpacker refuses into one sentence."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        what = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise CorpusError(f"{path} cannot be read ({what}); copy or download it again") from None
    except Exception as error:
        if type(error).__name__ != "ZstdError":
            raise
        raise CorpusError(f"{path} cannot be unpacked ({error}); copy or download it again") from None


def file_head(path: Path, count: int = 16) -> bytes:
    """The first bytes of a file, unpacked.

    Raises:
        CorpusError: as `open_unpacked`.
    """
    with open_unpacked(path) as file:
        return file.read(count)


def text_pieces(path: Path) -> Iterator[str]:
    """The text of a file in pieces of about a million characters; line ends become LF.

    UTF-8, or what a byte order mark says: UTF-16 or UTF-32.

    Raises:
        CorpusError: as `open_unpacked`, or the file is not text in that encoding; the byte is named.
    """
    with open_unpacked(path) as file, reading(path):
        raw = file.read(_PIECE)
        mark, encoding = next((one for one in _MARKS if raw.startswith(one[0])), (b"", "utf-8"))
        decoder = codecs.getincrementaldecoder(encoding)("strict")
        lines = io.IncrementalNewlineDecoder(decoder, translate=True)
        at, raw = len(mark), raw[len(mark) :]
        while True:
            pending = len(decoder.getstate()[0])
            try:
                text = lines.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                where = at - pending + error.start
                raise CorpusError(
                    f"{path} cannot be read as {encoding.upper()} text (byte {where:,}); "
                    "save it as UTF-8, or as UTF-16 with a byte order mark"
                ) from None
            if "\0" in text:
                zero = raw.find(0) if encoding == "utf-8" else 0
                raise CorpusError(
                    f"{path} is not text: it holds a zero byte (byte {at + max(zero, 0):,}); give text, or "
                    "save it as UTF-8"
                )
            if text:
                yield text
            if not raw:
                return
            at += len(raw)
            raw = file.read(_PIECE)


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a file without their ends.

    Raises:
        CorpusError: as `text_pieces`, or a line has no end within 268 million characters.
    """
    begun: list[str] = []
    length = 0
    for piece in text_pieces(path):
        first, *others = piece.split("\n")
        begun.append(first)
        length += len(first)
        if length > _LONGEST_LINE:
            raise CorpusError(
                f"{path} has a line of more than {_LONGEST_LINE:,} characters; is it JSON lines?"
            )
        if others:
            yield "".join(begun)
            yield from others[:-1]
            begun = [others[-1]]
            length = len(others[-1])
    if length:
        yield "".join(begun)
