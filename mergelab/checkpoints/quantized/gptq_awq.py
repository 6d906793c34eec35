"""Integers of GPTQ and AWQ: `qweight`, `qzeros` and `scales`, and GPTQ's `g_idx`.

Layouts (AutoGPTQ's `qlinear_cuda`, GPTQModel's `TorchLinear`, AutoAWQ's `WQLinear_GEMM`), in 32-bit words:

- GPTQ packs the codes of a column downwards: `qweight [in * bits / 32, out]`. Zero points are packed along
  rows, `qzeros [groups, out * bits / 32]`. The first version (`gptq`) stores them less 1, in the range of the
  codes, so that 0 is stored as the largest code; `gptq_v2` stores them as they are. The group of an input is
  `g_idx[input]`.
- AWQ packs along rows, `qweight [in, out / 8]` and `qzeros [groups, out / 8]`, eight codes of a word in the
  order 0, 2, 4, 6, 1, 3, 5, 7.

Both have `scales [groups, out]`, and the weight, `[out, in]`, is `(code - zero) * scale`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mergelab.checkpoints.dtypes import is_float
from mergelab.checkpoints.lora_tensor import read_whole
from mergelab.checkpoints.quantized.box_source import Transposed
from mergelab.checkpoints.quantized.codes import Numbers, PackedBits
from mergelab.checkpoints.quantized.findings import COPY, Findings, described
from mergelab.checkpoints.quantized.scaled_tensor import Blocks, ScaledTensor, block_length
from mergelab.checkpoints.source import TensorSource

__all__ = ["find_gptq_and_awq"]

_LASTS = ("qzeros", "scales", "g_idx")
_INT32 = np.dtype(np.int32)
_BITS = (2, 3, 4, 8)
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Place within its word of each of eight codes."""
_AWQ_OTHERS = ("gemv", "gemv_fast", "marlin")
_GPTQ = {"gptq": 1, "gptq_v2": 0}
"""What is added to stored zero points, by `checkpoint_format`."""
_AUTO_ROUND = ("auto-round", "intel/auto-round")
_AUTO_ROUND_PACKING = ("auto_round:auto_gptq", "auto_round:auto_awq")


def find_gptq_and_awq(findings: Findings) -> None:
    """Finds every `qweight` with its companions; which of the two it is, the shapes say."""
    for name, codes in findings.tensors.items():
        if name != "qweight" and not name.endswith(".qweight"):
            continue
        stem = name.removesuffix("qweight")
        used = findings.companions(stem, *_LASTS)
        lacking = [
            f"{stem}{last}" for last in ("qzeros", "scales") if f"{stem}{last}" not in findings.tensors
        ]
        if lacking:
            findings.fault(name, f"has no {' and no '.join(map(repr, lacking))}; {COPY}", *used)
            continue
        if (version := findings.settings.packing) in _AWQ_OTHERS:
            findings.fault(name, f"was packed by AWQ as version {version!r}; export it as 'gemm'", *used)
            continue
        zeros, scales = findings.tensors[f"{stem}qzeros"], findings.tensors[f"{stem}scales"]
        kinds = all(each.dtype == _INT32 for each in (codes, zeros)) and is_float(scales.dtype)
        if not kinds or any(len(each.shape) != 2 for each in (codes, zeros, scales)) or 0 in scales.shape:
            findings.fault(
                name,
                f"is {described(codes)}, with {described(zeros)} and {described(scales)} for zero points and "
                "scales; matrices of int32 and of a float type were expected: dequantize it with the library "
                "that made it",
                *used,
            )
        elif codes.shape[1] == scales.shape[1]:
            _find_gptq(findings, name, stem, codes, zeros, scales, used)
        elif codes.shape[1] * 8 == scales.shape[1]:
            _find_awq(findings, name, stem, codes, zeros, scales, used)
        else:
            findings.fault(name, _misfit(codes, zeros, scales), *used)


def _misfit(codes: TensorSource, zeros: TensorSource, scales: TensorSource) -> str:
    return (
        f"is {described(codes)}, with zero points {described(zeros)} and scales {described(scales)}: "
        "neither GPTQ's layout nor AWQ's (version gemm); dequantize it with the library that made it"
    )


def _find_gptq(
    findings: Findings,
    name: str,
    stem: str,
    codes: TensorSource,
    zeros: TensorSource,
    scales: TensorSource,
    used: tuple[str, ...],
) -> None:
    groups, out = scales.shape
    bits = zeros.shape[1] * 32 // out
    if bits not in _BITS or zeros.shape[0] != groups or out * bits % 32 or codes.shape[0] * 32 % bits:
        return findings.fault(name, _misfit(codes, zeros, scales), *used)
    stated, packing = findings.settings.checkpoint_format, findings.settings.packing
    if findings.settings.method in _AUTO_ROUND and packing not in _AUTO_ROUND_PACKING:
        return findings.fault(
            name,
            f"was packed by Auto-Round as {packing!r}; export it again as "
            f"{' or '.join(map(repr, _AUTO_ROUND_PACKING))}",
            *used,
        )
    if stated not in _GPTQ:
        return findings.fault(
            name,
            f"is of a model whose checkpoint_format is {stated!r}; save it again with GPTQModel as 'gptq' or "
            "'gptq_v2'",
            *used,
        )
    inputs = codes.shape[0] * 32 // bits
    order = findings.tensors.get(f"{stem}g_idx")
    if order is not None and order.shape == (0,):
        order = None
    place = np.zeros(0, np.int32)
    if order is not None:
        place = read_whole(order) if order.dtype.kind == "i" and order.shape == (inputs,) else np.array([-1])
        if place.min(initial=0) < 0 or place.max(initial=0) >= groups:
            return findings.fault(
                order.name,
                f"is {described(order)}; a group from 0 to {groups - 1} for each of {inputs} inputs was "
                f"expected; {COPY}",
                name,
                *used,
            )
    length = block_length(inputs, groups, findings.settings.group)
    if length is None and order is None:
        return findings.fault(name, _misfit(codes, zeros, scales), *used)
    numbers = np.arange(2**bits, dtype=np.float32)
    shifted = (np.arange(2**bits) + _GPTQ[stated]) % 2**bits
    parts = (codes, zeros, scales, *(() if order is None else (order,)))
    in_order = order is None or _in_order(place, length)
    grouped = f"in groups of {length}" if groups > 1 else "by row"
    scale = Blocks(
        Numbers(scales, (out, groups), turned=True),
        (out, groups),
        (1, length or inputs),
        None if in_order else order,
    )
    points = PackedBits(zeros, (groups, zeros.shape[1]), bits, shifted.astype(np.float32), turned=True)
    source = ScaledTensor(
        f"{stem}weight",
        (out, inputs),
        f"GPTQ int{bits} {grouped if in_order else 'in groups by g_idx'}",
        parts,
        PackedBits(codes, (codes.shape[0], out), bits, numbers, along_rows=True, turned=True),
        scale,
        replace(scale, cells=points),
    )
    return findings.give(source, name, *used)


def _in_order(place: np.ndarray, length: int | None) -> bool:
    return length is not None and np.array_equal(place, np.arange(len(place)) // length)


def _find_awq(
    findings: Findings,
    name: str,
    stem: str,
    codes: TensorSource,
    zeros: TensorSource,
    scales: TensorSource,
    used: tuple[str, ...],
) -> None:
    groups, out = scales.shape
    inputs = codes.shape[0]
    length = block_length(inputs, groups, findings.settings.group)
    if zeros.shape != (groups, out // 8) or length is None:
        return findings.fault(name, _misfit(codes, zeros, scales), *used)
    numbers = np.arange(16, dtype=np.float32)
    scale = Blocks(Numbers(scales, (groups, out)), (groups, out), (length, 1))
    stored = ScaledTensor(
        f"{stem}weight",
        (inputs, out),
        f"AWQ int4 {'by row' if groups == 1 else f'in groups of {length}'}",
        (codes, zeros, scales),
        PackedBits(codes, (inputs, out // 8), 4, numbers, order=_AWQ_ORDER),
        scale,
        replace(scale, cells=PackedBits(zeros, (groups, out // 8), 4, numbers, order=_AWQ_ORDER)),
    )
    return findings.give(Transposed.of(stored), name, *used)
