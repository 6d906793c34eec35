"""Codes of one byte with scales beside them: float8 in blocks, float8 and int8 of compressed-tensors, NVFP4.

Formulas: DeepSeek-V3's `weight_dequant` (`code * scale`, a scale per 128 x 128 block, the last ones ragged),
transformers' `Fp8Dequantize` (the same; int8 beside `_scale_inv` are pairs of E2M1; byte scales are
exponents), compressed-tensors' `dequantize` (`(code - zero_point) * scale`) and ModelOpt's NVFP4
(`code * (scale * scale_2)`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mergelab.checkpoints.dtypes import FLOATS, SAFETENSORS
from mergelab.checkpoints.quantized.codes import Bytes, Numbers, byte_table, fp4_pairs
from mergelab.checkpoints.quantized.findings import COPY, Findings, described
from mergelab.checkpoints.quantized.scaled_tensor import Blocks, ScaledTensor, block_length
from mergelab.checkpoints.source import TensorSource

__all__ = ["ACTIVATIONS", "FLOAT8", "find_scaled_weights", "scale_blocks"]

FLOAT8 = frozenset(dtype for dtype in FLOATS if dtype.itemsize == 1)
_INT8, _UINT8 = np.dtype(np.int8), np.dtype(np.uint8)
_CODES = FLOAT8 | {_INT8, _UINT8}
_SCALES = frozenset(FLOATS) | {SAFETENSORS["F8_E8M0"], _UINT8}
_EXPONENTS = (SAFETENSORS["F8_E8M0"], _UINT8)

ACTIVATIONS = (
    "input_scale", "input_scale_inv", "activation_scale", "input_zero_point", "input_global_scale",
    "input_observer.min_val", "input_observer.max_val", "output_scale", "output_zero_point", "qscale_act",
    "scale_input",
)  # fmt: skip
"""Last names of what a quantized module stores to quantize its inputs and outputs."""


def find_scaled_weights(findings: Findings) -> None:
    """Finds tensors of a one-byte type that have scales: `_scale_inv`, `_scale`, and others' names."""
    for name, tensor in findings.tensors.items():
        if name in findings.used or tensor.dtype not in _CODES or len(tensor.shape) < 2:
            continue
        stem = name.removesuffix("weight")
        beside = [f"{name}_scale_inv", f"{name}_scale"]
        if stem != name and stem.endswith("."):  # DeepSeek-V4's, Mistral's and ComfyUI's names
            beside += [f"{stem}scale", f"{stem}qscale_weight", f"{stem}scale_weight"]
        scale = next((each for each in beside if each in findings.tensors), None)
        # Bytes with one scale may be codes of two bits (BitNet): NVFP4 is known by its second scale.
        if scale is None or (tensor.dtype == _UINT8 and f"{name}_scale_2" not in findings.tensors):
            continue
        _find_one(findings, name, tensor, scale)


def _find_one(findings: Findings, name: str, tensor: TensorSource, scale_name: str) -> None:
    scale = findings.tensors[scale_name]
    pairs = tensor.dtype == _UINT8 or (tensor.dtype == _INT8 and not scale_name.endswith("_scale"))
    each = 2 if pairs else 1
    shape = (*tensor.shape[:-1], tensor.shape[-1] * each)
    used = _beside(findings, name)
    if scale.dtype not in _SCALES or (tensor.dtype == _INT8 and pairs and scale.dtype not in _EXPONENTS):
        findings.fault(
            scale_name,
            f"is {described(scale)}, which are no scales of {tensor.dtype} codes; {COPY}",
            name,
            *used,
        )
        return
    blocks = scale_blocks(findings, scale, shape)
    if blocks is None:
        findings.fault(scale_name, _misfit(scale.shape, name, shape), name, *used)
        return
    zero, zero_name = None, f"{name}_zero_point"
    parts = [tensor, scale]
    if zero_name in findings.tensors:
        point = findings.tensors[zero_name]
        zero = scale_blocks(findings, point, shape)
        if zero is None or point.dtype == _UINT8:
            findings.fault(zero_name, _misfit(point.shape, name, shape), name, scale_name, *used)
            return
        parts.append(point)
    elif findings.settings.asymmetric and tensor.dtype == _INT8:
        findings.fault(name, f"has no {zero_name!r}, though the config says it is asymmetric; {COPY}", *used)
        return
    outer = None
    if tensor.dtype == _UINT8:
        if (outer := findings.scalar(f"{name}_scale_2", name, scale_name, *used)) is None:
            return
        parts.append(findings.tensors[f"{name}_scale_2"])
    kind = "FP4" if pairs else str(tensor.dtype)
    source = ScaledTensor(
        name,
        shape,
        f"{kind} {_blocks_in_words(blocks, shape)}" + (" with zero points" if zero is not None else ""),
        tuple(parts),
        Bytes(tensor, (shape[-2], shape[-1]), fp4_pairs() if pairs else byte_table(tensor.dtype)),
        blocks,
        zero,
        outer=None if outer is None else np.float32(outer),
    )
    findings.give(source, name, *used)


def _beside(findings: Findings, name: str) -> tuple[str, ...]:
    """What is stored beside a weight to quantize activations."""
    lasts = [f"_{last}" for last in ("activation_scale", "input_scale", "input_scale_inv")]
    return (
        *findings.companions(name, *lasts),
        *findings.companions(name.removesuffix("weight"), *ACTIVATIONS),
    )


def scale_blocks(findings: Findings, scale: TensorSource, shape: Sequence[int]) -> Blocks | None:
    """The blocks that scales (or unpacked zero points) of a tensor of this shape hold for; None if none.

    There is one number for the tensor, for each matrix of a stack, for each row, or for each block.
    """
    lead, (rows, columns) = tuple(shape[:-2]), shape[-2:]
    found = tuple(scale.shape)
    size = math.prod(found)
    if size == 1:
        grid = (1, 1)
        if math.prod(lead) != 1:
            return Blocks(_Same(Numbers(scale, (1, 1))), grid, (rows, columns))
    elif lead and size == math.prod(lead) and found[: len(lead)] == lead:
        grid = (1, 1)
    elif found == (*lead, rows):
        grid = (rows, 1)
    elif len(found) == len(shape) and found[:-2] == lead:
        grid = (found[-2], found[-1])
    else:
        return None
    stated = findings.settings.block or (None, findings.settings.group)
    down, along = block_length(rows, grid[0], stated[0]), block_length(columns, grid[1], stated[1])
    if down is None or along is None:
        return None
    return Blocks(Numbers(scale, grid), grid, (down, along))


class _Same:
    """The one number of a whole stack, whichever of its matrices is asked for."""

    def __init__(self, cells: Numbers) -> None:
        self._cells = cells

    def box(self, matrix: int, rows: range, columns: range) -> np.ndarray:
        return self._cells.box(0, rows, columns)


def _blocks_in_words(blocks: Blocks, shape: Sequence[int]) -> str:
    rows, columns = shape[-2:]
    if blocks.shape == (1, 1):
        return "with one scale"
    if blocks.length[0] == 1:
        return "by row" if blocks.length[1] >= columns else f"in groups of {blocks.length[1]}"
    return f"in blocks of {min(blocks.length[0], rows)} x {min(blocks.length[1], columns)}"


def _misfit(found: Sequence[int], name: str, shape: Sequence[int]) -> str:
    return (
        f"has shape {list(found)}, which is neither one number, nor one per row, nor one per block of the "
        f"{list(shape)} codes of {name!r}; {COPY}"
    )
