"""Torch checkpoints (`.bin`, `.pt`, `.pth`) without torch: tensors read straight from the zip's stored bytes.

Since torch 1.6 such a file is an uncompressed zip: `<root>/data.pkl` describes the tensors and
`<root>/data/<key>` holds each storage; before, it was what `torch_legacy` reads. The pickle is read as inert
data (`torch_pickle`); nothing in it runs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mergelab.checkpoints.dtypes import SAFETENSORS
from mergelab.checkpoints.file_tensor import FileTensor, StridedTensor, WeightFile
from mergelab.checkpoints.source import TensorSource
from mergelab.checkpoints.stored_zip import stored_entries
from mergelab.checkpoints.torch_legacy import is_legacy, read_legacy
from mergelab.checkpoints.torch_pickle import Builder, read_pickle
from mergelab.errors import CheckpointError

__all__ = ["WRAPPERS", "PickledFile", "open_pickled"]

WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which training programs put the state dict, beside things that are not weights."""

_MAX_PICKLE = 64_000_000
_MAX_EXPANDED = 64_000_000
"""Bytes that a file's expanded tensors (of stride 0, or overlapping) may take beyond what is stored."""

_PLAIN_DEPTH, _PLAIN_ITEMS = 8, 10_000
_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL", "ComplexFloatStorage": "C64",
}  # fmt: skip


@dataclass(frozen=True)
class PickledFile:
    """A torch checkpoint whose description has been read: its tensors and the digest of that description.

    `values` holds the entries beside the tensors that are plain data, where they were allowed.
    """

    file: WeightFile
    tensors: dict[str, TensorSource]
    header_sha256: str
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _StorageType:
    """Stand-in of `torch.FloatStorage` and its kin; `dtype` is None for the untyped storage of bytes."""

    dtype: np.dtype[Any] | None


@dataclass(frozen=True)
class _Storage:
    """A run of bytes in the zip."""

    dtype: np.dtype[Any] | None
    offset: int
    nbytes: int


@dataclass(frozen=True)
class _Tensor:
    """A tensor as the pickle describes it, before it has a name."""

    storage: _Storage
    dtype: np.dtype[Any]
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def open_pickled(path: Path | str, *, values: bool = False) -> PickledFile:
    """Reads the description of a torch checkpoint; runs nothing of it and reads no weights.

    The tensors are those of the state dict: the file's own mapping of names to tensors, or the one under the
    first of `WRAPPERS` present. Non-contiguous tensors are gathered when read.

    Args:
        path: the file.
        values: allows numbers, words and mappings of them beside the tensors, and returns them.

    Raises:
        CheckpointError: not a torch file, a compressed zip, a forbidden global or opcode, a
            storage that is missing or too small, or no state dict in it.
    """
    file = WeightFile.open(Path(path))
    allowed = _allowed(str(path))
    if is_legacy(file):
        prefix = ""
        pickle, entries = read_legacy(file, allowed, _width)
    else:
        prefix, pickle, entries = _zipped(file)

    def persistent(identity: object) -> _Storage:
        return _find_storage(identity, prefix, entries, str(path))

    found = read_pickle(pickle, allowed=allowed, persistent=persistent, place=str(path))
    plain = _take_plain(found) if values and isinstance(found, dict) else {}
    state = _state_dict(found, str(path))
    _check_expanded(state, str(path))
    tensors = {name: _source(name, tensor, file) for name, tensor in state.items()}
    return PickledFile(file, tensors, hashlib.sha256(pickle).hexdigest(), plain)


def _width(kind: object) -> int:
    """Bytes of an element of a storage."""
    return kind.dtype.itemsize if isinstance(kind, _StorageType) and kind.dtype is not None else 1


def _zipped(file: WeightFile) -> tuple[str, bytes, dict[str, tuple[int, int]]]:
    """The names of storages but for their keys, the pickle, and `(offset, size)` of every entry of a zip."""
    path = file.path
    entries = stored_entries(file)
    roots = [name.removesuffix("/data.pkl") for name in entries if name.endswith("/data.pkl")]
    if len(roots) != 1 or f"{roots[0]}/constants.pkl" in entries:
        raise CheckpointError(
            f"{path} is not a saved state dict (a zip with one data.pkl was expected; a TorchScript program "
            "has constants.pkl too); save model.state_dict() instead"
        )
    root = roots[0]
    offset, length = entries[f"{root}/data.pkl"]
    if length > _MAX_PICKLE:
        raise CheckpointError(
            f"{path}: data.pkl has {length} bytes, too many to describe weights; do not load it"
        )
    if f"{root}/byteorder" in entries:
        begin, size = entries[f"{root}/byteorder"]
        order = file.read(begin, min(size, 16), "the byte order")
        if order != b"little":
            raise CheckpointError(
                f"{path} has byte order {order!r}; save it again on a little-endian machine"
            )
    return f"{root}/data/", file.read(offset, length, "data.pkl"), entries


def _find_storage(
    identity: object, prefix: str, entries: Mapping[str, tuple[int, int]], place: str
) -> _Storage:
    view: object = None
    if isinstance(identity, tuple) and len(identity) == 6:  # the legacy format's
        *identity, view = identity
        identity = tuple(identity)
    if (
        not isinstance(identity, tuple)
        or len(identity) != 5
        or identity[0] != "storage"
        or not isinstance(identity[1], _StorageType)
        or not isinstance(identity[2], str)
        or type(identity[4]) is not int
    ):
        raise CheckpointError(f"{place} has a persistent id that names no storage; do not load this file")
    _, kind, key, _, count = identity
    offset, size = entries.get(prefix + key, (0, -1))
    if size < 0:
        raise CheckpointError(
            f"{place} refers to the storage {key!r}, which is not in the file; download it again"
        )
    expected = count * (kind.dtype.itemsize if kind.dtype else 1)
    if expected != size:
        raise CheckpointError(
            f"{place}: storage {key!r} has {size} bytes where {expected} were expected; save it again"
        )
    return (
        _Storage(kind.dtype, offset, size) if view is None else _view(view, kind.dtype, offset, size, place)
    )


def _view(view: object, dtype: np.dtype[Any] | None, offset: int, size: int, place: str) -> _Storage:
    """The part of a storage that `(key, first element, elements)` names."""
    width = dtype.itemsize if dtype else 1
    if isinstance(view, tuple) and len(view) == 3 and type(view[1]) is type(view[2]) is int:
        start, count = view[1] * width, view[2] * width
        if 0 <= start <= start + count <= size:
            return _Storage(dtype, offset + start, count)
    raise CheckpointError(f"{place} has a storage that is no part of another one; save it again")


def _allowed(place: str) -> dict[str, object]:
    """Stand-ins for the globals a state dict may name; none of them is torch's own."""

    def typed_tensor(storage: Any, start: Any, shape: Any, strides: Any, *rest: Any) -> _Tensor:
        if not isinstance(storage, _Storage) or storage.dtype is None or any(rest[2:]):
            raise CheckpointError(
                f"{place} has a tensor without a typed storage or with lazy bits set; save it again"
            )
        return _checked(storage, storage.dtype, start, shape, strides, place)

    def untyped_tensor(
        storage: Any, start: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, *rest: Any
    ) -> _Tensor:
        if not isinstance(storage, _Storage) or not isinstance(dtype, np.dtype) or any(rest):
            raise CheckpointError(
                f"{place} has a tensor without a known dtype or with lazy bits set; save it again"
            )
        return _checked(storage, dtype, start, shape, strides, place)

    def parameter(data: Any, *_: Any) -> _Tensor:
        if not isinstance(data, _Tensor):
            raise CheckpointError(f"{place} has a parameter that is not a tensor; save it again")
        return data

    def mapping(pairs: Any = ()) -> dict[str, Any]:
        if not all(
            isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs
        ):
            raise CheckpointError(
                f"{place} has an OrderedDict that is not made of named values; save it again"
            )
        return {key: value for key, value in pairs}

    def size(values: Any) -> tuple[Any, ...]:
        return tuple(values)

    def device(*_: Any) -> str:
        return "device"

    allowed: dict[str, object] = {
        "collections.OrderedDict": Builder("OrderedDict", mapping),
        "torch._utils._rebuild_tensor": Builder("tensor", typed_tensor),
        "torch._utils._rebuild_tensor_v2": Builder("tensor", typed_tensor),
        "torch._utils._rebuild_tensor_v3": Builder("tensor", untyped_tensor),
        "torch._utils._rebuild_parameter": Builder("parameter", parameter),
        "torch.nn.parameter.Parameter": Builder("parameter", parameter),
        "torch.Size": Builder("Size", size),
        "torch.device": Builder("device", device),
        "torch.storage.UntypedStorage": _StorageType(None),
    }
    allowed |= {f"torch.{name}": _StorageType(SAFETENSORS[short]) for name, short in _STORAGES.items()}
    # numpy's and torch's names of the element types agree, but for bool and the OCP float8 exponent.
    allowed |= {f"torch.{dtype}": dtype for dtype in SAFETENSORS.values()}
    return allowed


def _checked(
    storage: _Storage, dtype: np.dtype[Any], start: Any, shape: Any, strides: Any, place: str
) -> _Tensor:
    sizes = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides) <= 64
    if not sizes or not all(type(value) is int and 0 <= value < 2**63 for value in (start, *shape, *strides)):
        # Not quoted: what stands there may be an object whose text is exponentially long.
        raise CheckpointError(
            f"{place} has a tensor whose shape, strides or offset are not sizes; save it again"
        )
    # numpy multiplies the other axes of an empty tensor, too.
    if math.prod(d for d in shape if d) * dtype.itemsize >= 2**63:
        raise CheckpointError(
            f"{place} has a tensor of shape {shape}, too large to be genuine; do not load it"
        )
    last = start + sum((d - 1) * s for d, s in zip(shape, strides, strict=True))
    if math.prod(shape) and (last + 1) * dtype.itemsize > storage.nbytes:
        raise CheckpointError(
            f"{place} has a tensor of shape {shape} that reaches beyond its storage of {storage.nbytes} "
            "bytes; save it again"
        )
    return _Tensor(storage, dtype, start, shape, strides)


def _check_expanded(state: Mapping[str, _Tensor], place: str) -> None:
    """Checks that reading the tensors makes little more than what the file holds."""
    left = _MAX_EXPANDED
    for name, tensor in state.items():
        size = math.prod(tensor.shape) * tensor.dtype.itemsize
        left -= max(size - tensor.storage.nbytes, 0)
        if left < 0:
            raise CheckpointError(
                f"{place}: tensor {name!r} of shape {tensor.shape} would take {size} bytes, but its storage "
                f"holds {tensor.storage.nbytes}, which it repeats; save tensor.contiguous(), if it is genuine"
            )


def _state_dict(found: Any, place: str) -> dict[str, _Tensor]:
    """Returns the mapping of names to tensors in what the pickle held."""
    state = found
    for wrapper in WRAPPERS:
        if isinstance(found, dict) and not _has_tensors(found) and isinstance(found.get(wrapper), dict):
            state = found[wrapper]
            break
    if not isinstance(state, dict) or not _has_tensors(state):
        keys = f" with keys {', '.join(map(repr, list(found)[:6]))}" if isinstance(found, dict) else ""
        raise CheckpointError(
            f"{place} holds a {type(found).__name__}{keys}, not a state dict (names to tensors, by itself or "
            f"under one of {', '.join(WRAPPERS)}); save model.state_dict()"
        )
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, _Tensor):
            raise CheckpointError(
                f"{place}: entry {name!r} of the state dict is a {type(value).__name__.lstrip('_')}, not "
                "a tensor; save a state dict of tensors alone"
            )
    return state


def _take_plain(found: dict[Any, Any]) -> dict[str, Any]:
    """Takes out of a mapping what is a number, a word, or a mapping of such."""
    # What is shared counts each time it is met, and what has too many items is not a plain value.
    items = [_PLAIN_ITEMS]
    names = [name for name, value in found.items() if isinstance(name, str) and _is_plain(value, items)]
    return {name: found.pop(name) for name in names}


def _is_plain(value: Any, items: list[int], depth: int = _PLAIN_DEPTH) -> bool:
    items[0] -= 1
    if items[0] < 0 or depth == 0:
        return False
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item, items, depth - 1) for key, item in value.items())
    return value is None or isinstance(value, str | int | float | bool)


def _has_tensors(mapping: dict[Any, Any]) -> bool:
    return any(isinstance(value, _Tensor) for value in mapping.values())


def _source(name: str, tensor: _Tensor, file: WeightFile) -> TensorSource:
    offset = tensor.storage.offset + tensor.start * tensor.dtype.itemsize
    if _is_contiguous(tensor.shape, tensor.strides):
        return FileTensor(name, tensor.shape, tensor.dtype, file, offset)
    return StridedTensor(name, tensor.shape, tensor.dtype, file, offset, tensor.strides)


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for dimension, stride in zip(reversed(shape), reversed(strides), strict=True):
        if dimension > 1 and stride != expected:
            return 0 in shape
        expected *= dimension
    return True
