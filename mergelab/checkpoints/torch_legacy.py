"""Torch's file format before version 1.6: five pickles in a row, then the storages, each after its length.

As `torch.serialization._legacy_save` writes it: a magic number, the protocol's number, facts of the machine,
the object, the keys of its storages in order; then for each key the number of its elements (int64,
little-endian) and their bytes. The pickles are read as inert data (`torch_pickle`); nothing in them runs.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

from mergelab.checkpoints.file_tensor import WeightFile
from mergelab.checkpoints.torch_pickle import Builder, read_pickle
from mergelab.errors import CheckpointError

__all__ = ["is_legacy", "read_legacy"]

_MAGIC = 0x1950A86A20F9469CFC6C
_HEAD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number as every writer pickles it
_PROTOCOL = 1001
_MAX_PICKLES = 64_000_000


def is_legacy(file: WeightFile) -> bool:
    """Whether a file begins as the format's files do."""
    return file.read(0, min(file.size, len(_HEAD)), "its first bytes") == _HEAD


def read_legacy(
    file: WeightFile, allowed: Mapping[str, object], width: Callable[[object], int]
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Returns the pickle of the saved object, and `(offset, size)` in bytes of each storage by its key.

    Args:
        file: the file.
        allowed: stand-ins of globals, as `read_pickle` takes them.
        width: the bytes of an element, by the stand-in of a storage's type.

    Raises:
        CheckpointError: a forbidden global or opcode, storages that are not described or leave the file, or
            another protocol or byte order.
    """
    place = str(file.path)
    head = file.read(0, min(file.size, _MAX_PICKLES), "the pickles that describe its tensors")
    stream = io.BytesIO(head)

    def plain() -> Any:
        return read_pickle(stream, allowed={}, persistent=_no_storage, place=place)

    magic, protocol, machine = plain(), plain(), plain()
    little = isinstance(machine, dict) and machine.get("little_endian") is True
    if magic != _MAGIC or protocol != _PROTOCOL or not little:
        raise CheckpointError(
            f"{place} is not a little-endian file of torch's protocol {_PROTOCOL}; save it again with a "
            "newer torch"
        )
    widths: dict[str, int] = {}

    def note(identity: object) -> None:
        if isinstance(identity, tuple) and len(identity) > 2 and isinstance(identity[2], str):
            widths[identity[2]] = width(identity[1])

    begin = stream.tell()
    read_pickle(stream, allowed=_inert(allowed), persistent=note, place=place)
    pickle = head[begin : stream.tell()]
    keys = plain()
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in widths for key in keys):
        raise CheckpointError(f"{place} lists storages that no tensor of it has; save it again")
    storages: dict[str, tuple[int, int]] = {}
    offset = stream.tell()
    for key in keys:
        count = int.from_bytes(file.read(offset, 8, f"the length of storage {key!r}"), "little")
        size = count * widths[key]
        if key in storages or size > file.size - offset - 8:
            raise CheckpointError(
                f"{place}: storage {key!r} is there twice or reaches beyond the end of the file; it is "
                "truncated or damaged: download or copy it again"
            )
        storages[key] = (offset + 8, size)
        offset += 8 + size
    return pickle, storages


def _no_storage(identity: object) -> object:
    raise CheckpointError("a description that is not of the tensors names a storage; do not load this file")


def _inert(allowed: Mapping[str, object]) -> dict[str, object]:
    """The stand-ins with builders that make nothing: only the storages' ids are looked for."""

    def nothing(*arguments: object) -> None:
        return None

    def mapping(*arguments: object) -> dict[str, object]:
        return {}

    makers = {"collections.OrderedDict": Builder("OrderedDict", mapping)}
    return {
        name: makers.get(name, Builder(name, nothing)) if isinstance(value, Builder) else value
        for name, value in allowed.items()
    }
