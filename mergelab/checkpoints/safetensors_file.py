"""One safetensors file: its header parsed strictly, its tensors as sources that read from the file.

Format: 8 bytes little-endian header length, that many bytes of JSON, then the tensors' bytes without gaps
(https://huggingface.co/docs/safetensors). Everything the format promises is checked before a tensor is
offered, so a damaged or hostile file is an error with a name, never a wrong weight.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergelab.checkpoints.dtypes import SAFETENSORS
from mergelab.checkpoints.file_tensor import FileTensor, WeightFile
from mergelab.checkpoints.json_data import parse_json
from mergelab.errors import CheckpointError

__all__ = ["SafetensorsFile", "open_safetensors"]

MAX_HEADER = 100_000_000
"""The largest header the reference implementation reads, in bytes."""

_MAX_ITEMS = 4_000_000  # signs that begin something in the header: some 500,000 tensors
_MAX_DIMENSIONS = 64  # numpy's limit
_SUB_BYTE = ("F4", "F6_E2M3", "F6_E3M2")


@dataclass(frozen=True)
class SafetensorsFile:
    """A safetensors file whose header has been read and checked.

    Attributes:
        file: the file.
        tensors: its tensors by name, in file order.
        metadata: the header's `__metadata__`, often `{"format": "pt"}`.
        header_sha256: hex digest of the header, which names every tensor, dtype, shape and place.
    """

    file: WeightFile
    tensors: dict[str, FileTensor]
    metadata: dict[str, str]
    header_sha256: str


def open_safetensors(path: Path | str) -> SafetensorsFile:
    """Reads and checks the header of a safetensors file; reads no weights.

    Raises:
        CheckpointError: truncated, oversized or malformed header, unknown dtype, offsets that overlap,
            leave gaps or do not match shape and file size.
    """
    file = WeightFile.open(Path(path))
    if file.size < 8:
        raise CheckpointError(
            f"{path} is {file.size} bytes long, too short for a safetensors file; download or copy it again"
        )
    length = int.from_bytes(file.read(0, 8, "the header length"), "little")
    if length > MAX_HEADER:
        raise CheckpointError(
            f"{path}: the header claims {length} bytes, more than the {MAX_HEADER} allowed; "
            "this is not a safetensors file or it is damaged"
        )
    if 8 + length > file.size:
        raise CheckpointError(
            f"{path} ends at byte {file.size}, inside its header of {length} bytes; download or copy it again"
        )
    header = file.read(8, length, "the header")
    entries, metadata = _parse(header, path)
    tensors = _place(entries, file, 8 + length)
    return SafetensorsFile(file, tensors, metadata, hashlib.sha256(header).hexdigest())


def _parse(header: bytes, path: Path | str) -> tuple[dict[str, Any], dict[str, str]]:
    place = f"{path}: the header"
    if not header.startswith(b"{"):
        raise CheckpointError(f"{place} does not start with '{{'; this is not a safetensors file")
    if sum(header.count(sign) for sign in b"[{,") > _MAX_ITEMS:
        raise CheckpointError(f"{place} lists more than any genuine one does; do not load this file")
    entries = parse_json(header, place, sizes_only=True)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(
            f"{place} has a __metadata__ that does not map names to texts; write the file again"
        )
    if any(_has_surrogate(text) for text in (*entries, *metadata, *metadata.values())):
        raise CheckpointError(
            f"{place} has a name with a lone surrogate, which is not text; write the file again"
        )
    return entries, metadata


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _place(entries: dict[str, Any], file: WeightFile, data_start: int) -> dict[str, FileTensor]:
    """Checks every entry and that together they cover the file exactly; returns them in file order."""
    spans = {name: _checked_entry(f"{file.path}: tensor {name!r}", entry) for name, entry in entries.items()}
    position = 0
    tensors: dict[str, FileTensor] = {}
    for name, (dtype, shape, begin, end) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if begin != position:
            what = "overlaps the tensor before it" if begin < position else "leaves a gap before it"
            raise CheckpointError(
                f"{file.path}: tensor {name!r} starts at byte {begin} where {position} was expected and "
                f"{what}; download or write the file again"
            )
        if data_start + end > file.size:
            raise CheckpointError(
                f"{file.path}: tensor {name!r} reaches to byte {data_start + end} but the file ends at "
                f"{file.size}; it is truncated: download or copy it again"
            )
        tensors[name] = FileTensor(name, shape, SAFETENSORS[dtype], file, data_start + begin)
        position = end
    if data_start + position != file.size:
        raise CheckpointError(
            f"{file.path} has {file.size - data_start - position} bytes after its last tensor; "
            "download or write the file again"
        )
    return tensors


def _checked_entry(place: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Returns (dtype name, shape, begin, end) of one header entry whose size agrees with its shape."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"{place} must have exactly dtype, shape and data_offsets; write the file again"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SAFETENSORS:
        remedy = (
            "it is packed below one byte per element: dequantize the model first"
            if dtype in _SUB_BYTE
            else f"the known ones are {', '.join(SAFETENSORS)}"
        )
        raise CheckpointError(f"{place} has the unknown dtype {dtype!r}; {remedy}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(
            f"{place} has shape {shape!r} and data_offsets {offsets!r} where lists of sizes were expected; "
            "write the file again"
        )
    # numpy multiplies the other axes of an empty tensor, too.
    nbytes = math.prod(d for d in shape[:_MAX_DIMENSIONS] if d) * SAFETENSORS[dtype].itemsize
    if len(shape) > _MAX_DIMENSIONS or nbytes >= 2**63:
        raise CheckpointError(f"{place} has a shape too large to be genuine; write the file again")
    begin, end = offsets
    expected = math.prod(shape) * SAFETENSORS[dtype].itemsize
    if end - begin != expected:
        raise CheckpointError(
            f"{place} holds {end - begin} bytes but {dtype} of shape {shape} needs {expected}; "
            "download or write the file again"
        )
    return dtype, tuple(shape), begin, end


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value < 2**63 for value in values)
