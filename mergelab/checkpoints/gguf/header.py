"""The header of a GGUF file: its metadata and where its tensors lie, read within bounds and written.

Format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic, version, counts, key-value pairs,
tensor infos, padding, then the tensors, each from a multiple of the alignment on. All numbers are
little-endian.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergelab.checkpoints.file_tensor import WeightFile
from mergelab.errors import CheckpointError, quoted

__all__ = ["ALIGNMENT", "GgufHeader", "GgufTensorInfo", "Typed", "header_bytes", "read_header"]

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
_ALIGNMENT_KEY = "general.alignment"

_MAX_HEADER = 2**29  # the largest vocabularies take some 20 MB
_MAX_ITEMS = 8_000_000  # key-value pairs, elements of arrays, tensors
_MAX_NAME = 65535
_MAX_DIMENSIONS = 4
_CHUNK = 2**20

_STRING, _ARRAY = 8, 9
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class GgufTensorInfo:
    """One tensor as the header has it.

    Attributes:
        name: type name in llama.cpp's spelling.
        shape: rows first, the reverse of the order in the file.
        kind: number of the type in ggml.
        offset: byte of the file where it begins.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says before its tensors.

    Attributes:
        file: the file.
        metadata: values by key; arrays are lists.
        tensors: entries in the order of the header; offsets are checked against nothing yet.
        sha256: hex digest of the header.
    """

    file: WeightFile
    metadata: Mapping[str, Any]
    tensors: tuple[GgufTensorInfo, ...]
    sha256: str


class _Cursor:
    """Reads a file from its beginning, in chunks; never beyond its end or the bound of a header."""

    def __init__(self, file: WeightFile):
        self.file, self.data, self.position, self.items = file, bytearray(), 0, 0

    def fault(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.file.path}: the GGUF header {what}; download or copy it again")

    def take(self, count: int) -> memoryview:
        """The next `count` bytes."""
        end = self.position + count
        if end > min(self.file.size, _MAX_HEADER):
            limit = "file" if end > self.file.size else f"{_MAX_HEADER:,} bytes that a header may have"
            raise self.fault(f"reaches to byte {end:,}, beyond the {limit}")
        if end > len(self.data):
            missing = min(max(end - len(self.data), _CHUNK, len(self.data)), self.file.size - len(self.data))
            self.data = self.data + self.file.read(len(self.data), missing, "the header")
        start, self.position = self.position, end
        return memoryview(self.data)[start:end]

    def number(self, form: str) -> Any:
        """One number of a `struct` format."""
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def count(self, what: str) -> int:
        """A number of things that follow, counted against all that a header may hold."""
        found = int(self.number("Q"))
        self.items += found
        if self.items > _MAX_ITEMS:
            raise self.fault(f"claims {found:,} {what}, more than any genuine one has")
        return found

    def text(self, limit: int = _MAX_HEADER, errors: str = "replace") -> str:
        """A string of at most `limit` bytes."""
        length = int(self.number("Q"))
        if length > limit:
            raise self.fault(f"has a string of {length:,} bytes at byte {self.position:,}")
        try:
            return str(self.take(length), "utf-8", errors)
        except UnicodeDecodeError:
            raise self.fault(f"has a name at byte {self.position:,} that is not UTF-8") from None

    def texts(self, count: int) -> list[str]:
        """So many strings; a vocabulary has a hundred thousand: those at hand are cut without a call each."""
        found: list[str] = []
        while len(found) < count:
            data, at, limit = self.data, self.position, min(len(self.data), _MAX_HEADER)
            while len(found) < count and (begin := at + 8) <= limit:
                end = begin + int.from_bytes(data[at:begin], "little")
                if end > limit:
                    break
                found.append(data[begin:end].decode("utf-8", "replace"))
                at = end
            self.position = at
            if len(found) < count:
                found.append(self.text())  # reads on, or says what is wrong
        return found

    def value(self, kind: int) -> Any:
        """A value of a metadata type."""
        if kind in _FORMATS:
            return self.number(_FORMATS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise self.fault(f"has a value of the unknown type {kind} at byte {self.position:,}")
        element, count = int(self.number("I")), self.count("elements of an array")
        if element == _STRING:
            return self.texts(count)
        if element not in _FORMATS:
            raise self.fault(f"has an array of the unknown type {element} at byte {self.position:,}")
        form = f"<{count}{_FORMATS[element]}"
        return list(struct.unpack(form, self.take(struct.calcsize(form))))


def read_header(path: Path) -> GgufHeader:
    """Reads and checks the header of a GGUF file; reads no tensor.

    Raises:
        CheckpointError: it is no GGUF file of version 2 or 3, is cut off, or claims what no genuine one does.
    """
    cursor = _Cursor(WeightFile.open(path))
    if cursor.file.size < 24 or bytes(cursor.take(4)) != MAGIC:
        raise CheckpointError(f"{path} does not begin as a GGUF file does; download or copy it again")
    version = int(cursor.number("I"))
    if version not in (2, VERSION):
        order = " (or its numbers are big-endian)" if version >= 2**16 else ""
        raise CheckpointError(
            f"{path} is a GGUF file of version {version}{order}, but only little-endian files of version 2 "
            f"and {VERSION} are read; convert the model again with a recent llama.cpp"
        )
    tensors, pairs = cursor.count("tensors"), cursor.count("metadata values")
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        key = cursor.text(_MAX_NAME, "strict")
        if key in metadata:
            raise cursor.fault(f"has the key {quoted(key)} twice")
        metadata[key] = cursor.value(int(cursor.number("I")))
    infos = [_tensor_info(cursor) for _ in range(tensors)]
    alignment = metadata.get(_ALIGNMENT_KEY, ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= 2**20:
        raise cursor.fault(f"has {_ALIGNMENT_KEY} = {quoted(alignment)}")
    start = _aligned(cursor.position, alignment)
    digest = hashlib.sha256(memoryview(cursor.data)[: cursor.position]).hexdigest()
    placed = (GgufTensorInfo(t.name, t.shape, t.kind, start + t.offset) for t in infos)
    return GgufHeader(cursor.file, metadata, tuple(placed), digest)


def _tensor_info(cursor: _Cursor) -> GgufTensorInfo:
    name = cursor.text(_MAX_NAME, "strict")
    dimensions = int(cursor.number("I"))
    if dimensions > _MAX_DIMENSIONS:
        raise cursor.fault(f"gives the tensor {quoted(name)} {dimensions} dimensions")
    shape = tuple(int(cursor.number("Q")) for _ in range(dimensions))
    if any(not 0 < size < 2**48 for size in shape):
        raise cursor.fault(f"gives the tensor {quoted(name)} the shape {list(shape)}")
    return GgufTensorInfo(name, shape[::-1], int(cursor.number("I")), int(cursor.number("Q")))


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


@dataclass(frozen=True)
class Typed:
    """A metadata value with the type to store it in, where Python's own type leaves a choice.

    Attributes:
        form: `struct` format: `I` for uint32, `i` for int32, `f` for float32, `B`, ...
        value: number, or sequence of numbers.
    """

    form: str
    value: Any


def header_bytes(
    metadata: Mapping[str, Any], tensors: Iterable[tuple[str, Sequence[int], int, int]]
) -> tuple[bytes, list[int]]:
    """The header of a new file, padded up to its first tensor, and where each tensor begins.

    Args:
        metadata: `str`, `bool`, `Typed` or sequences of `str`, by key.
        tensors: name, shape (rows first), type and bytes of each tensor.
    """
    listed = list(tensors)
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(listed), len(metadata))]
    for key, value in metadata.items():
        parts += [_text(key), *_value(value)]
    offsets, position = [], 0
    for name, shape, kind, nbytes in listed:
        dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(tuple(shape)))
        parts += [_text(name), dimensions, struct.pack("<IQ", kind, position)]
        offsets.append(position)
        position = _aligned(position + nbytes, ALIGNMENT)
    length = sum(map(len, parts))
    start = _aligned(length, ALIGNMENT)
    return b"".join([*parts, bytes(start - length)]), [start + offset for offset in offsets]


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> list[bytes]:
    numbers = {form: number for number, form in _FORMATS.items()}
    if isinstance(value, bool):
        value = Typed("?", value)
    if isinstance(value, str):
        return [struct.pack("<I", _STRING), _text(value)]
    if not isinstance(value, Typed):
        return [struct.pack("<IIQ", _ARRAY, _STRING, len(value)), *map(_text, value)]
    if isinstance(value.value, Sequence):
        head = struct.pack("<IIQ", _ARRAY, numbers[value.form], len(value.value))
        return [head, struct.pack(f"<{len(value.value)}{value.form}", *value.value)]
    return [struct.pack("<I", numbers[value.form]), struct.pack(f"<{value.form}", value.value)]
