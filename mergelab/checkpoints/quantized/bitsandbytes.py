"""Weights as bitsandbytes saves them: int8 with a maximum per row (`SCB`), and NF4 or FP4 in flat blocks.

Formulas (https://github.com/bitsandbytes-foundation/bitsandbytes, `functional.py` and `backends/`): an int8
weight is `code * SCB[row] * (1 / 127)`, in this order. A 4-bit weight is `quant_map[code] * absmax[block]`,
its codes two per byte, the higher bits first, over the flat elements; where the maxima are quantized too,
`absmax = nested_quant_map[byte] * nested_absmax[block] + nested_offset`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergelab.checkpoints.json_data import parse_json
from mergelab.checkpoints.lora_tensor import read_whole
from mergelab.checkpoints.quantized.box_source import BOX, BoxSource
from mergelab.checkpoints.quantized.codes import Bytes, Numbers, byte_table, meanings
from mergelab.checkpoints.quantized.findings import COPY, Findings, described
from mergelab.checkpoints.quantized.scaled_tensor import Blocks, ScaledTensor
from mergelab.checkpoints.source import TensorSource
from mergelab.errors import CheckpointError, quoted

__all__ = ["FlatBlocks", "find_bitsandbytes"]

_STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(nf4|fp4)")
_MAX_STATE = 1 << 16
_BLOCKS = frozenset(2**power for power in range(5, 13))
_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_BY_127 = np.float32(7.874015718698502e-3)
"""The library's own constant for `1 / 127`."""


def find_bitsandbytes(findings: Findings) -> None:
    """Finds every weight beside an `SCB`, and every tensor that has a `quant_state`."""
    for name in findings.tensors:
        if match := _STATE.fullmatch(name):
            _find_4_bit(findings, match[1], name, match[2])
        elif name.endswith(".SCB") or name == "SCB":
            _find_int8(findings, name.removesuffix("SCB"), name)
    for name in findings.tensors:
        if name.endswith(".weight.absmax") and name not in findings.used:
            plain = name.removesuffix(".absmax")
            used = findings.companions(plain, *_PARTS)
            lacking = f"is of a weight without a '{plain}.quant_state.bitsandbytes__nf4' or '..._fp4'"
            findings.fault(name, f"{lacking}; {COPY}", plain, *used)


def _find_int8(findings: Findings, stem: str, name: str) -> None:
    weight, maxima = findings.tensors.get(f"{stem}weight"), findings.tensors[name]
    form = findings.companions(stem, "weight_format")
    if weight is None or weight.dtype != np.int8 or len(weight.shape) != 2:
        found = "there is none" if weight is None else f"that is {described(weight)}"
        return findings.fault(name, f"belongs to an int8 '{stem}weight', but {found}; {COPY}", *form)
    if maxima.dtype != np.float32 or math.prod(maxima.shape) != weight.shape[0]:
        return findings.fault(
            name,
            f"is {described(maxima)}; one float32 per row of {described(weight)} was expected; {COPY}",
            weight.name,
            *form,
        )
    if form and (order := findings.scalar(form[0], weight.name, name)) is not None and order != 0:
        return findings.fault(
            weight.name,
            f"is stored in an order of a GPU (weight_format {int(order)}); save it again with "
            "bitsandbytes 0.45 or newer",
            name,
            *form,
        )
    rows, columns = weight.shape
    source = ScaledTensor(
        weight.name,
        (rows, columns),
        "int8 by row",
        (weight, maxima),
        Bytes(weight, (rows, columns), byte_table(weight.dtype)),
        Blocks(Numbers(maxima, (rows, 1)), (rows, 1), (1, columns)),
        factor=_BY_127,
    )
    return findings.give(source, weight.name, *form)


@dataclass(frozen=True, eq=False)
class FlatBlocks(BoxSource):
    """Four-bit codes of flat elements, a block of which has one maximum.

    Attributes:
        codes: Stored bytes, of any type.
        pairs: Values of the two codes of each byte, float32 `[256, 2]`.
        length: Elements of a block.
        maxima: Maximum of each block; float32, or bytes that `nested` explains.
        nested: Value of each byte of `maxima`, maximum of each block of these, how many are a block, and what
            is added; None where the maxima are stored as such.
    """

    codes: TensorSource
    pairs: np.ndarray
    length: int
    maxima: TensorSource
    nested: tuple[np.ndarray, np.ndarray, int, np.float32] | None

    def box(self, matrix: int, rows: range, columns: range) -> np.ndarray:
        count, width = (1, 1, *self.shape)[-2:]
        first = matrix * count + rows.start
        if len(columns) == width or len(rows) == 1:
            flat = self._flat(first * width + columns.start, len(rows) * len(columns))
            return flat.reshape(len(rows), len(columns))
        out = np.empty((len(rows), len(columns)), np.float32)
        step = max(1, BOX // width)
        for done in range(0, len(rows), step):
            height = min(step, len(rows) - done)
            whole = self._flat((first + done) * width, height * width).reshape(height, width)
            out[done : done + height] = whole[:, columns.start : columns.stop]
        return out

    def _flat(self, start: int, count: int) -> np.ndarray:
        width = self.codes.dtype.itemsize
        low, high = start // 2 // width, -(-(start + count) // (2 * width))
        stored = np.empty(high - low, self.codes.dtype)
        self.codes.read_into(low, stored)
        skipped = start - low * 2 * width
        values = meanings(self.pairs, stored.view(np.uint8)).reshape(-1)[skipped : skipped + count]
        block = start // self.length
        maxima = self._maxima(block, (start + count - 1) // self.length + 1 - block)
        values *= maxima[np.arange(start, start + count) // self.length - block]
        return values

    def _maxima(self, start: int, count: int) -> np.ndarray:
        stored = np.empty(count, self.maxima.dtype)
        self.maxima.read_into(start, stored)
        if self.nested is None:
            return stored.astype(np.float32)
        values, outer, length, offset = self.nested
        return values[stored] * outer[np.arange(start, start + count) // length] + offset


def _find_4_bit(findings: Findings, plain: str, name: str, kind: str) -> None:
    used = (name, *findings.companions(plain, *_PARTS))
    codes = findings.tensors.get(plain)
    if codes is None:
        return findings.fault(name, f"belongs to {plain!r}, which is missing; {COPY}", *used)
    try:
        source = _four_bits(findings, plain, name, kind, codes)
    except _Misfit as error:
        return findings.fault(plain, f"cannot be read: {error}; {COPY}", *used)
    return findings.give(source, plain, *used)


class _Misfit(ValueError):
    """A part of a 4-bit weight that does not fit the others."""


def _four_bits(findings: Findings, plain: str, name: str, kind: str, codes: TensorSource) -> FlatBlocks:
    state = _state(findings.tensors[name])
    shape = state.get("shape")
    if not isinstance(shape, list) or not shape or not all(type(n) is int and 0 < n < 2**40 for n in shape):
        raise _Misfit(f"the shape in {name!r} is {quoted(shape)}")
    length, size = state.get("blocksize"), math.prod(shape)
    if type(length) is not int or length not in _BLOCKS or state.get("quant_type", kind) != kind:
        raise _Misfit(f"{name!r} says blocksize {quoted(length)} and type {quoted(state.get('quant_type'))}")
    if math.prod(codes.shape) * codes.dtype.itemsize != -(-size // 2):
        raise _Misfit(f"it is {described(codes)}, which does not hold {shape} codes of 4 bits")
    table = _part(findings, f"{plain}.quant_map", 16)
    maxima = findings.tensors.get(f"{plain}.absmax")
    blocks = -(-size // length)
    if maxima is None or maxima.shape != (blocks,):
        raise _Misfit(f"{plain + '.absmax'!r} does not hold one maximum for each of {blocks} blocks")
    nested, parts = None, [codes, maxima, findings.tensors[name]]
    if "nested_blocksize" in state:
        inner, offset = state["nested_blocksize"], state.get("nested_offset")
        if (
            type(inner) is not int
            or inner <= 0
            or not isinstance(offset, int | float)
            or maxima.dtype != np.uint8
        ):
            raise _Misfit(
                f"{name!r} says nested_blocksize {quoted(inner)} and nested_offset {quoted(offset)}"
            )
        outer = _part(findings, f"{plain}.nested_absmax", -(-blocks // inner))
        nested = (_part(findings, f"{plain}.nested_quant_map", 256), outer, inner, np.float32(offset))
    elif maxima.dtype.kind not in "fV":
        raise _Misfit(f"{maxima.name!r} is {described(maxima)}, and nothing says how it is quantized")
    pairs = table[np.stack([np.arange(256) >> 4, np.arange(256) & 15], axis=1)]
    form = f"{kind} in blocks of {length}" + (", maxima quantized too" if nested is not None else "")
    return FlatBlocks(plain, tuple(shape), form, tuple(parts), codes, pairs, length, maxima, nested)


def _state(stored: TensorSource) -> Mapping[str, Any]:
    if stored.dtype != np.uint8 or len(stored.shape) != 1 or stored.shape[0] > _MAX_STATE:
        raise _Misfit(f"{stored.name!r} is {described(stored)}, not the bytes of a JSON text")
    try:
        state = parse_json(read_whole(stored).tobytes(), stored.name)
    except CheckpointError as error:
        raise _Misfit(str(error)) from error
    if not isinstance(state, dict):
        raise _Misfit(f"{stored.name!r} holds {quoted(state)} where a JSON object was expected")
    return state


def _part(findings: Findings, name: str, size: int) -> np.ndarray:
    source = findings.tensors.get(name)
    if source is None or math.prod(source.shape) != size or source.dtype != np.float32:
        found = "there is none" if source is None else f"it is {described(source)}"
        raise _Misfit(f"{name!r} should hold {size} float32 numbers, but {found}")
    return read_whole(source).reshape(-1)
