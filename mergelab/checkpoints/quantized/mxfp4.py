"""MXFP4 experts as gpt-oss stores them: `_blocks` of 16 bytes, which are 32 E2M1 numbers, and `_scales`.

Reference: transformers' `convert_moe_packed_tensors` (`integrations/mxfp4.py`); format: OCP Microscaling
Formats (MX) v1.0. The file holds `[experts, out, groups, 16]`; the model's tensor is `[experts, in, out]`.
"""

from __future__ import annotations

import numpy as np

from mergelab.checkpoints.dtypes import SAFETENSORS
from mergelab.checkpoints.quantized.box_source import Transposed
from mergelab.checkpoints.quantized.codes import Bytes, Numbers, fp4_pairs
from mergelab.checkpoints.quantized.findings import COPY, Findings, described
from mergelab.checkpoints.quantized.scaled_tensor import Blocks, ScaledTensor

__all__ = ["find_mxfp4"]

_BYTES = 16
_EXPONENTS = (np.dtype(np.uint8), SAFETENSORS["F8_E8M0"])


def find_mxfp4(findings: Findings) -> None:
    """Finds every pair of `NAME_blocks` and `NAME_scales`."""
    for name, blocks in findings.tensors.items():
        if not name.endswith("_blocks") or blocks.dtype != np.uint8 or len(blocks.shape) != 4:
            continue
        plain = name.removesuffix("_blocks")
        scales = findings.tensors.get(f"{plain}_scales")
        experts, out, groups, width = blocks.shape
        if scales is None:
            findings.fault(name, f"has no '{plain}_scales'; {COPY}")
        elif width != _BYTES or scales.shape != (experts, out, groups) or scales.dtype not in _EXPONENTS:
            findings.fault(
                name,
                f"is {described(blocks)} and its scales are {described(scales)}; 16 bytes and one exponent "
                f"per block were expected; {COPY}",
                scales.name,
            )
        else:
            shape = (experts, out, groups * 2 * _BYTES)
            codes = Bytes(blocks, shape[1:], fp4_pairs())
            grid = Blocks(Numbers(scales, (out, groups)), (out, groups), (1, 2 * _BYTES))
            stored = ScaledTensor(plain, shape, "MXFP4 in groups of 32", (blocks, scales), codes, grid)
            findings.give(Transposed.of(stored), name)
