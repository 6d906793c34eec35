"""What is left of a quantized checkpoint when every reader has looked: named, or known to be harmless."""

from __future__ import annotations

import re

from mergelab.checkpoints.dtypes import is_float
from mergelab.checkpoints.quantized.findings import COPY, Findings, described
from mergelab.checkpoints.quantized.scaled_weights import FLOAT8
from mergelab.checkpoints.source import TensorSource

__all__ = ["drop_cache_scales", "name_the_rest"]

_FOREIGN = {
    r".*\.(W_q|W_q_shape)": "HQQ",
    r".*\.(codebooks|codes)": "AQLM",
    r".*\.(q_weight|q_invperm|q_scale_max)": "EXL2",
    r".*\.(trellis|suh|svh)": "EXL3",
    r".*\.Qidxs(_\d+)?": "QuIP#",
    r".*\.(res_)?centroids\.weight": "VPTQ",
    r".*\.dense_weights": "SpQR",
    r".*[._:](weight_|weight:)?qdata": "torchao",
    r".*\.weight\._(data|scale|shift)": "quanto",
    r".*\.(bitmask|compressed|row_offsets)": "compressed-tensors' sparse formats",
    r".*\.(scale_packed|B_24|B_meta)": "compressed-tensors' marlin formats",
    r".*\.weight_scales": "EETQ",
}
"""Names that only these libraries' files have, and which nothing here reads."""

_ORPHANS = re.compile(
    r".*(\.qweight|\.qzeros|\.weight_packed|\.weight_scale|\.weight_scale_2|\.weight_zero_point|\.weight_g_idx"
    r"|\.weight_global_scale|\.weight_shape|_scale_inv|\.qscale_weight|\.SCB|\.absmax|\.nested_absmax|\.quant_map"
    r"|_proj_blocks)"
)
"""Names of parts of formats that are read, and of nothing else."""

_CACHE = re.compile(
    r".*(\.|_)(k|v|q|kv|qk|prob|key|value)_(scale|zero_point|global_scale)|.*\.[kvq]_proj\.output_(scale|zero_point)"
)
"""Scales of the key-value cache: they belong to how a model is run, not to its weights."""


def name_the_rest(findings: Findings, quantized: bool) -> None:
    """Records faults for tensors that are parts of a quantization and that no reader has used.

    Args:
        findings: What the readers have found.
        quantized: Whether the config speaks of a quantization.
    """
    foreign: dict[str, list[str]] = {}
    orphans: list[str] = []
    for name in findings.tensors:
        if name in findings.used:
            continue
        kind = next((kind for pattern, kind in _FOREIGN.items() if re.fullmatch(pattern, name)), None)
        if kind is not None:
            foreign.setdefault(kind, []).append(name)
        elif _ORPHANS.fullmatch(name):
            orphans.append(name)
    for kind, names in foreign.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        findings.used.update(names)
        findings.faults.append(
            f"{findings.place} is quantized by {kind} (it has {names[0]!r}{more}), which cannot be read; "
            "dequantize it with the library that made it, or take the model it was made from"
        )
    for name in orphans:
        findings.fault(name, f"is {described(findings.tensors[name])} and belongs to no weight; {COPY}")
    for name, tensor in findings.tensors.items():
        if name in findings.used or not _is_code(name, tensor):
            continue
        if quantized or findings.used:
            method = f" (quant_method {findings.settings.method!r})" if findings.settings.method else ""
            findings.fault(
                name,
                f"is {described(tensor)} without a scale that says what its codes mean{method}; dequantize "
                "it with the library that made it, or take the model it was made from",
            )


def _is_code(name: str, tensor: TensorSource) -> bool:
    """Whether a tensor holds codes if its model is quantized at all."""
    matrix = len(tensor.shape) >= 2 and (name.endswith("weight") or name.endswith("_proj"))
    return matrix and (tensor.dtype in FLOAT8 or not is_float(tensor.dtype))


def drop_cache_scales(findings: Findings) -> None:
    """Takes the scales of the key-value cache out of a quantized model's tensors."""
    findings.used.update(name for name in findings.tensors if _CACHE.fullmatch(name))
