"""Writes a torch checkpoint (`.pt`) without torch: a stored zip of raw arrays and a pickle that lists them.

The pickle names only what `torch.load(weights_only=True)` accepts.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["write_pickled"]

_STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "int64": "LongStorage"}


def write_pickled(path: Path, tree: Mapping[str, Any]) -> None:
    """Writes nested dictionaries of arrays, numbers and strings.

    Args:
        path: the file.
        tree: keys are strings; arrays are float32, float16 or int64.
    """
    arrays: list[np.ndarray] = []
    data = b"\x80\x02" + _value(tree, arrays) + b"."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(_entry("archive/data.pkl"), data)
        archive.writestr(_entry("archive/byteorder"), "little")
        for key, array in enumerate(arrays):
            with archive.open(_entry(f"archive/data/{key}"), "w", force_zip64=True) as file:
                file.write(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
        archive.writestr(_entry("archive/version"), "3\n")


def _entry(name: str) -> zipfile.ZipInfo:
    """A member without the time of its writing, so that the same arrays are the same bytes."""
    entry = zipfile.ZipInfo(name)
    entry.external_attr = 0o600 << 16
    return entry


def _value(value: Any, arrays: list[np.ndarray]) -> bytes:
    if isinstance(value, Mapping):
        items = b"".join(_text(str(key)) + _value(item, arrays) for key, item in value.items())
        return b"}(" + items + b"u"
    if isinstance(value, np.ndarray):
        return _tensor(value, arrays)
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        return _integer(value)
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    return _text(str(value))


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _integer(value: int) -> bytes:
    data = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def _tuple(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"


def _tensor(array: np.ndarray, arrays: list[np.ndarray]) -> bytes:
    """`torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)`."""
    key = str(len(arrays))
    arrays.append(array)
    strides = np.cumprod((1, *array.shape[:0:-1]))[::-1] if array.ndim else ()
    storage = (
        b"(" + _text("storage") + f"ctorch\n{_STORAGES[array.dtype.name]}\n".encode()
        + _text(key) + _text("cpu") + _integer(array.size) + b"tQ"
    )  # fmt: skip
    arguments = (
        storage + _integer(0) + _tuple(array.shape) + _tuple(tuple(map(int, strides)))
        + b"\x89" + b"ccollections\nOrderedDict\n" + b")R"
    )  # fmt: skip
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"
