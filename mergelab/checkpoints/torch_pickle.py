"""The pickles of torch files as plain data, read and written; nothing is ever executed."""

from __future__ import annotations

import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mergelab.errors import CheckpointError

__all__ = ["Builder", "read_pickle", "write_pickled"]


@dataclass(frozen=True)
class Builder:
    """The stand-in of a callable global: `build` makes inert data of the arguments a pickle gives it."""

    name: str
    build: Callable[..., object]


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = frozenset((
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "UNICODE",
    "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
))  # fmt: skip
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_SMALL_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MAX_OPCODES = 1_000_000
"""Some 30,000 tensors; each opcode can make an object, and a hostile file makes nothing else."""

_KEYS = (str, int, float, bytes, type(None))


class _Malformed(Exception):
    """The opcodes do not fit together; the message says which one."""


class _Interpreter:
    def __init__(
        self, allowed: Mapping[str, object], persistent: Callable[[object], object], place: str
    ) -> None:
        self.allowed = allowed
        self.persistent = persistent
        self.place = place
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes | BinaryIO) -> Any:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if count > _MAX_OPCODES:
                raise _Malformed(f"more than {_MAX_OPCODES} opcodes")
            if opcode.name == "STOP":
                if len(self.stack) != 1 or self.marks:
                    raise _Malformed("STOP with an unfinished stack")
                return self.stack[0]
            self._step(opcode.name, argument)
        raise _Malformed("no STOP")

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in ("PROTO", "FRAME"):
            return
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name in _SMALL_TUPLES:
            stack.append(tuple(self._pop(_SMALL_TUPLES[name])))
        elif name == "TUPLE":
            stack.append(tuple(self._pop_to_mark()))
        elif name in ("DICT", "LIST"):
            items = self._pop_to_mark()
            stack.append(items if name == "LIST" else _set_items({}, items))
        elif name in ("SETITEM", "SETITEMS"):
            items = self._pop(2) if name == "SETITEM" else self._pop_to_mark()
            _set_items(self._peek_container(dict), items)
        elif name in ("APPEND", "APPENDS"):
            items = self._pop(1) if name == "APPEND" else self._pop_to_mark()
            self._peek_container(list).extend(items)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self._peek()
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self._peek()
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "GLOBAL":
            stack.append(self._global(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack.append(self._global(*self._pop(2)))
        elif name == "BINPERSID":
            stack.append(self.persistent(self._pop(1)[0]))
        elif name in ("REDUCE", "NEWOBJ"):
            stack.append(self._build(*self._pop(2)))
        elif name == "BUILD":
            # State of an OrderedDict (`_metadata`): it describes modules, not weights, and is dropped.
            if not isinstance(self._pop(1)[0], dict) or not isinstance(self._peek(), dict):
                raise CheckpointError(
                    f"{self.place} sets the state of an object (pickle opcode BUILD), which weights never "
                    "need; do not load this file"
                )
        else:
            raise CheckpointError(
                f"{self.place} uses the pickle opcode {name}, which weights never need; do not load this file"
            )

    def _pop(self, count: int) -> list[Any]:
        floor = self.marks[-1] if self.marks else 0
        if len(self.stack) - count < floor:
            raise _Malformed("an opcode takes more than the stack holds")
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return taken

    def _pop_to_mark(self) -> list[Any]:
        floor = self.marks.pop()
        taken = self.stack[floor:]
        del self.stack[floor:]
        return taken

    def _peek(self) -> Any:
        return self.stack[-1]

    def _peek_container(self, kind: type) -> Any:
        if not isinstance(self._peek(), kind):
            raise _Malformed(f"items are added to a {type(self._peek()).__name__}")
        return self._peek()

    def _global(self, module: object, name: object) -> object:
        if not isinstance(module, str) or not isinstance(name, str):
            raise _Malformed("a global is named by something else than text")
        full = f"{module}.{name}"
        if full not in self.allowed:
            raise CheckpointError(
                f"{self.place} names the global {full!r}, which could run code and is never called here; "
                "if you trust the file, load it with its own program and save the tensors as safetensors"
            )
        return self.allowed[full]

    def _build(self, builder: object, arguments: object) -> object:
        if not isinstance(builder, Builder) or not isinstance(arguments, tuple):
            raise CheckpointError(
                f"{self.place} calls a {type(builder).__name__}, which is not a constructor of weights; "
                "do not load this file"
            )
        return builder.build(*arguments)


def _set_items(target: dict[Any, Any], items: list[Any]) -> dict[Any, Any]:
    if len(items) % 2:
        raise _Malformed("a key without a value")
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Only scalars: hashing a deeply shared tuple takes exponential time.
        if not isinstance(key, _KEYS):
            raise _Malformed(f"a {type(key).__name__} is used as a key")
        target[key] = value
    return target


def read_pickle(
    data: bytes | BinaryIO,
    *,
    allowed: Mapping[str, object],
    persistent: Callable[[object], object],
    place: str,
) -> Any:
    """Returns what a pickle describes, built of plain data and the stand-ins in `allowed`.

    Args:
        data: the pickle, or a stream that is read to the pickle's end.
        allowed: stand-ins by full global name, e.g. `"collections.OrderedDict"`; a `Builder` may be called,
            anything else is only a value.
        persistent: turns a persistent id (inert data) into a value; raises CheckpointError for a bad one.
        place: file name for messages.

    Raises:
        CheckpointError: a forbidden global or opcode, or opcodes that do not fit together.
    """
    try:
        return _Interpreter(allowed, persistent, place).run(data)
    except CheckpointError:
        raise
    except (_Malformed, ValueError, TypeError, LookupError, EOFError, OverflowError, MemoryError) as error:
        message = (
            f"{place} is not a readable pickle ({type(error).__name__}: {error}); download or save it again"
        )
        raise CheckpointError(message) from error


_STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "int64": "LongStorage"}


def write_pickled(path: Path, tree: Mapping[str, Any]) -> None:
    """Writes nested SAEs of arrays, numbers and strings.

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
