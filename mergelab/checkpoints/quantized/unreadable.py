"""What is left of a quantized checkpoint when every reader has looked: named, or known to be harmless."""

from __future__ import annotations

import math
import re

from mergelab.checkpoints.dtypes import is_float
from mergelab.checkpoints.quantized.findings import COPY, Findings, described
from mergelab.checkpoints.quantized.scaled_weights import FLOAT8
from mergelab.checkpoints.source import TensorSource

__all__ = ["drop_cache_scales", "name_the_rest"]

_FOREIGN = {
    "HQQ": ("W_q", "W_q_shape"),
    "AQLM": ("codebooks", "codes"),
    "EXL2": ("q_weight", "q_invperm", "q_scale_max"),
    "EXL3": ("trellis", "suh", "svh"),
    "QuIP#": ("Qidxs", "Qidxs_0"),
    "VPTQ": ("centroids.weight", "res_centroids.weight"),
    "SpQR": ("dense_weights",),
    "torchao": ("_weight_qdata", "weight_qdata", "weight:qdata", "qdata"),
    "quanto": ("weight._data", "weight._scale", "weight._shift"),
    "EETQ": ("weight_scales",),
    "compressed-tensors' sparse formats": ("bitmask", "compressed", "row_offsets"),
    "compressed-tensors' marlin formats": ("scale_packed", "B_24", "B_meta"),
}
"""Last parts of names that only these libraries' files have, and which nothing here reads."""
_KINDS = {last: kind for kind, lasts in _FOREIGN.items() for last in lasts}

_PARTS = (
    ".qweight", ".qzeros", ".weight_packed", "_scale_inv", ".qscale_weight", ".SCB", ".absmax",
    ".nested_absmax", ".quant_map", "_proj_blocks",
)  # fmt: skip
"""Ends of names of parts of formats that are read."""
_LIKELY_PARTS = (
    ".weight_scale", ".weight_scale_2", ".weight_zero_point", ".weight_g_idx", ".weight_global_scale",
    ".weight_shape",
)  # fmt: skip
"""The same, where a model that is not quantized may have a parameter of this name."""

_CACHE = re.compile(
    r"(?:[kv]_proj\.output|k|v|kv|key|value)_(?:scale|zero_point|global_scale)|(?:q|qk|prob)_scale"
)
"""Last parts of the names of scales of the key-value cache, which are of how a model is run."""


def name_the_rest(findings: Findings, quantized: bool) -> None:
    """Records faults for tensors that are parts of a quantization and that no reader has used.

    Args:
        findings: What the readers have found.
        quantized: Whether the config speaks of a quantization.
    """
    rest = {name: tensor for name, tensor in findings.tensors.items() if name not in findings.used}
    quantized = quantized or bool(findings.used)
    foreign: dict[str, list[str]] = {}
    for name, tensor in rest.items():
        if (quantized or _holds_codes(tensor)) and (kind := _kind(name)) is not None:
            foreign.setdefault(kind, []).append(name)
    for kind, names in foreign.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        findings.used.update(names)
        findings.faults.append(
            f"{findings.place} is quantized by {kind} (it has {names[0]!r}{more}), which cannot be read; "
            "dequantize it with the library that made it, or take the model it was made from"
        )
    scaled = {name.rpartition(".")[0] for name in rest if "scale" in name.rpartition(".")[2]}
    for name, tensor in rest.items():
        if name in findings.used:
            continue
        if name.endswith(_PARTS) or (quantized and name.endswith(_LIKELY_PARTS)):
            findings.fault(name, f"is {described(tensor)} and belongs to no weight; {COPY}")
        elif name.endswith(("weight", "_proj")) and (
            (quantized and _holds_codes(tensor))
            or (tensor.dtype in FLOAT8 and name.rpartition(".")[0] in scaled)
        ):
            method = f" (quant_method {findings.settings.method!r})" if findings.settings.method else ""
            findings.fault(
                name,
                f"is {described(tensor)} without a scale that says what its codes mean{method}; dequantize "
                "it with the library that made it, or take the model it was made from",
            )


def _kind(name: str) -> str | None:
    """The library whose name for a part of a quantized weight this is."""
    before, _, last = name.rpartition(".")
    return _KINDS.get(last) or _KINDS.get(f"{before.rpartition('.')[2]}.{last}")


def _holds_codes(tensor: TensorSource) -> bool:
    """Whether a tensor is a matrix of a type that codes are stored in."""
    return len(tensor.shape) >= 2 and (tensor.dtype in FLOAT8 or not is_float(tensor.dtype))


def drop_cache_scales(findings: Findings) -> None:
    """Takes the scales of the key-value cache out of a quantized model's tensors."""
    for name, tensor in findings.tensors.items():
        before, _, last = name.rpartition(".")
        found = _CACHE.fullmatch(last) or _CACHE.fullmatch(f"{before.rpartition('.')[2]}.{last}")
        if found and (math.prod(tensor.shape) == 1 or last[0] in "kv"):
            findings.used.add(name)
