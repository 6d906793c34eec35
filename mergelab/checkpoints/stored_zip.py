"""Where the entries of an uncompressed zip lie in its file; nothing is extracted."""

from __future__ import annotations

import io
import struct
import zipfile

from mergelab.checkpoints.file_tensor import WeightFile
from mergelab.errors import CheckpointError

__all__ = ["data_offset", "list_zip", "stored_entries"]

_MAX_DIRECTORY = 16_000_000  # bytes: some 200,000 entries


def stored_entries(file: WeightFile) -> dict[str, tuple[int, int]]:
    """Returns (offset, size) of every entry of the zip, all of them stored uncompressed inside the file."""
    listed = list_zip(file, "torch zip")
    entries: dict[str, tuple[int, int]] = {}
    for info in listed:
        name = info.filename
        if name.startswith("/") or "\\" in name or ":" in name or ".." in name.split("/") or name in entries:
            raise CheckpointError(
                f"{file.path} has the zip entry {name!r}, twice or leaving the archive; do not load it"
            )
        if (
            info.compress_type != zipfile.ZIP_STORED
            or info.flag_bits & 1
            or info.compress_size != info.file_size
        ):
            raise CheckpointError(
                f"{file.path}: zip entry {name!r} is compressed or encrypted, which torch never writes; "
                "save it again"
            )
        entries[name] = (data_offset(file, info), info.file_size)
    end = 0
    for name, (offset, size) in sorted(entries.items(), key=lambda item: item[1]):
        if offset < end or offset + size > file.size:
            raise CheckpointError(
                f"{file.path}: zip entry {name!r} overlaps another or leaves the file; do not load it"
            )
        end = offset + size
    return entries


class _Directory(io.FileIO):
    """A zip of which at most so much is read at once as the directory of a genuine one takes."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"its directory has {size} bytes")
        return super().read(_MAX_DIRECTORY if size is None or size < 0 else size) or b""


def list_zip(file: WeightFile, kind: str) -> list[zipfile.ZipInfo]:
    """The directory of a zip.

    Args:
        file: the zip.
        kind: what it should be, for the message.

    Raises:
        CheckpointError: it is none, or its directory is damaged or larger than that of any genuine one.
    """
    try:
        with _Directory(file.path) as opened, zipfile.ZipFile(opened) as archive:
            return archive.infolist()
    except OSError as error:
        raise CheckpointError(f"{file.path} cannot be read ({error.strerror or error})") from error
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        ValueError,
        IndexError,
        OverflowError,
        MemoryError,
        struct.error,
        EOFError,
    ) as error:
        message = f"{file.path} is not a {kind} file ({error}); download or save it again"
        raise CheckpointError(message) from error


def data_offset(file: WeightFile, info: zipfile.ZipInfo) -> int:
    """Where the content of an entry begins.

    Raises:
        CheckpointError: the entry has no header of its own there.
    """
    header = file.read(info.header_offset, 30, f"zip entry {info.filename!r}")
    if header[:4] != b"PK\x03\x04":
        raise CheckpointError(
            f"{file.path}: zip entry {info.filename!r} has no local header; download it again"
        )
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    return info.header_offset + 30 + name_length + extra_length
