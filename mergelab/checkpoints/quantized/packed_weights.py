"""Weights packed by compressed-tensors: integers of 1 to 8 bits in words, and 4-bit floats in bytes.

Formats `pack-quantized`, `nvfp4-pack-quantized` and `mxfp4-pack-quantized`
(https://github.com/vllm-project/compressed-tensors, `compressors/`): signed integers are stored with
`2 ** (bits - 1)` added, packed along rows; zero points likewise, packed down columns. A column's group is its
number over the group's size, or what `weight_g_idx` says, where no entry is -1.
"""

from __future__ import annotations

import numpy as np

from mergelab.checkpoints.lora_tensor import read_whole
from mergelab.checkpoints.quantized.codes import Bytes, PackedBits, fp4_pairs
from mergelab.checkpoints.quantized.findings import COPY, Findings, described
from mergelab.checkpoints.quantized.scaled_tensor import Blocks, ScaledTensor
from mergelab.checkpoints.quantized.scaled_weights import ACTIVATIONS, scale_blocks
from mergelab.checkpoints.source import TensorSource

__all__ = ["find_packed_weights"]

_INT32, _UINT8 = np.dtype(np.int32), np.dtype(np.uint8)
_BESIDE = ("weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", "weight_global_scale")
_FLOAT4_LENGTHS = (16, 32)  # NVFP4's and MXFP4's groups


def find_packed_weights(findings: Findings) -> None:
    """Finds every `weight_packed` with its `weight_scale` and, for integers, its `weight_shape`."""
    for name, packed in findings.tensors.items():
        if not name.endswith("weight_packed") or name in findings.used:
            continue
        stem = name.removesuffix("weight_packed")
        used = findings.companions(stem, *_BESIDE, *ACTIVATIONS)
        scale = findings.tensors.get(f"{stem}weight_scale")
        if scale is None:
            findings.fault(name, f"has no '{stem}weight_scale'; {COPY}", *used)
        elif packed.dtype == _UINT8 and len(packed.shape) == 2:
            _find_floats(findings, name, stem, packed, scale, used)
        elif packed.dtype == _INT32 and len(packed.shape) in (2, 3):
            _find_integers(findings, name, stem, packed, scale, used)
        else:
            findings.fault(
                name, f"is {described(packed)}; int32 or uint8 matrices were expected; {COPY}", *used
            )


def _find_floats(
    findings: Findings, name: str, stem: str, packed: TensorSource, scale: TensorSource, used: tuple[str, ...]
) -> None:
    shape = (packed.shape[0], packed.shape[1] * 2)
    blocks = scale_blocks(findings, scale, shape)
    length = 0 if blocks is None else blocks.length[1]
    if blocks is None or blocks.length[0] != 1 or length not in _FLOAT4_LENGTHS:
        return findings.fault(
            f"{stem}weight_scale",
            f"is {described(scale)}, not one scale per 16 or 32 of {list(shape)} codes of {name!r}; {COPY}",
            name,
            *used,
        )
    parts, outer = [packed, scale], None
    if (whole := findings.tensors.get(f"{stem}weight_global_scale")) is not None:
        if (outer := findings.scalar(whole.name, name, *used)) is None:
            return None
        parts.append(whole)
    elif scale.dtype != _UINT8:
        return findings.fault(name, f"has no '{stem}weight_global_scale'; {COPY}", *used)
    source = ScaledTensor(
        f"{stem}weight",
        shape,
        f"{'MXFP4' if scale.dtype == _UINT8 else 'NVFP4'} in groups of {length}",
        tuple(parts),
        Bytes(packed, shape, fp4_pairs()),
        blocks,
        divisor=None if outer is None else np.float32(outer),
    )
    return findings.give(source, name, *used)


def _find_integers(
    findings: Findings, name: str, stem: str, packed: TensorSource, scale: TensorSource, used: tuple[str, ...]
) -> None:
    shape = _true_shape(findings, name, stem, packed)
    if shape is None:
        return findings.fault(
            name, f"has no '{stem}weight_shape' of {len(packed.shape)} sizes; {COPY}", *used
        )
    bits, whole = _bits(findings, packed.shape[-1], shape[-1])
    if bits is None or tuple(packed.shape[:-1]) != shape[:-1]:
        return findings.fault(
            name,
            f"is {described(packed)}, which does not hold {list(shape)} codes of 1 to 8 bits; {COPY}",
            *used,
        )
    blocks = scale_blocks(findings, scale, shape)
    if blocks is None:
        return findings.fault(
            f"{stem}weight_scale",
            f"is {described(scale)}, which does not fit the {list(shape)} codes of {name!r}; {COPY}",
            name,
            *used,
        )
    values = (np.arange(2**bits) - 2 ** (bits - 1)).astype(np.float32)
    parts, zero = [packed, scale], None
    if (point := findings.tensors.get(f"{stem}weight_zero_point")) is not None:
        zero = _zero_points(findings, point, blocks, bits, values, shape)
        if zero is None:
            return findings.fault(
                point.name,
                f"is {described(point)}, which does not fit the scales {list(scale.shape)}; {COPY}",
                name,
                *used,
            )
        parts.append(point)
    elif findings.settings.asymmetric:
        return findings.fault(
            name, f"has no '{stem}weight_zero_point', though the config says it is asymmetric; {COPY}", *used
        )
    if (order := findings.tensors.get(f"{stem}weight_g_idx")) is not None:
        groups = read_whole(order)
        if order.dtype.kind != "i" or order.shape != shape[-1:] or groups.max(initial=0) >= blocks.shape[1]:
            return findings.fault(
                order.name,
                f"is {described(order)}, which does not give {shape[-1]} columns a group; {COPY}",
                name,
                *used,
            )
        if groups.min(initial=0) >= 0:
            blocks = Blocks(blocks.cells, blocks.shape, blocks.length, order)
            zero = None if zero is None else Blocks(zero.cells, zero.shape, zero.length, order)
            parts.append(order)
    grouped = f"in groups of {blocks.length[1]}" if blocks.shape[1] > 1 else "by row"
    source = ScaledTensor(
        f"{stem}weight",
        shape,
        f"int{bits} {grouped if blocks.shape != (1, 1) else 'with one scale'}"
        + (" with zero points" if zero is not None else ""),
        tuple(parts),
        PackedBits(packed, (packed.shape[-2], packed.shape[-1]), bits, values, whole=whole),
        blocks,
        zero,
    )
    return findings.give(source, name, *used)


def _true_shape(findings: Findings, name: str, stem: str, packed: TensorSource) -> tuple[int, ...] | None:
    stored = findings.tensors.get(f"{stem}weight_shape")
    if stored is None or stored.dtype.kind != "i" or stored.shape != (len(packed.shape),):
        return None
    sizes = tuple(int(size) for size in read_whole(stored))
    return sizes if all(0 < size < 2**40 for size in sizes) else None


def _bits(findings: Findings, words: int, columns: int) -> tuple[int | None, bool]:
    """How many bits make `columns` codes fill `words` words, and whether no code is split between two.

    Small matrices leave a choice: what the config mentions comes first. Splitting codes of 3, 5, 6 and 7 bits
    is what newer versions of compressed-tensors do.
    """
    likely = (*findings.settings.bits, 4, 8, *range(1, 9))
    for whole in (False, True):
        for bits in likely:
            needed = -(-columns // (32 // bits)) if whole else -(-columns * bits // 32)
            if needed == words:
                return bits, whole
    return None, False


def _zero_points(
    findings: Findings,
    point: TensorSource,
    blocks: Blocks,
    bits: int,
    values: np.ndarray,
    shape: tuple[int, ...],
) -> Blocks | None:
    if point.dtype == np.int8:  # as older versions store them
        found = scale_blocks(findings, point, shape)
        return found if found is not None and found.shape == blocks.shape else None
    needed = (*shape[:-2], -(-blocks.shape[0] * bits // 32), blocks.shape[1])
    if point.dtype == _INT32 and tuple(point.shape) == needed:
        cells = PackedBits(point, (needed[-2], needed[-1]), bits, values, along_rows=True)
        return Blocks(cells, blocks.shape, blocks.length)
    return None
