"""The element types weights are stored in: their safetensors, numpy and recipe names, and how they mix."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np

from mergelab.errors import CheckpointError, did_you_mean

__all__ = ["FLOATS", "SAFETENSORS", "dtype_from_name", "is_float", "promote", "safetensors_name"]

SAFETENSORS: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "C64": np.dtype(np.complex64),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""safetensors dtype name -> numpy dtype; the sub-byte types (F4, F6_*) have no numpy form and are absent."""

_NAMES = {dtype: name for name, dtype in SAFETENSORS.items()}

FLOATS: frozenset[np.dtype[Any]] = frozenset(
    SAFETENSORS[name]
    for name in ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
)
"""Types whose values are weights. F8_E8M0 is not among them: it stores block scales, exponents alone."""

_FLOAT8 = frozenset(dtype for dtype in FLOATS if dtype.itemsize == 1)


def is_float(dtype: np.dtype[Any]) -> bool:
    """True if tensors of this dtype hold weights a merge may compute with (float8 included)."""
    return dtype in FLOATS


def safetensors_name(dtype: np.dtype[Any]) -> str:
    """Returns the name a safetensors header uses for `dtype`, e.g. `"BF16"`.

    Raises:
        CheckpointError: safetensors has no such type.
    """
    try:
        return _NAMES[dtype]
    except KeyError:
        known = ", ".join(str(d) for d in _NAMES)
        message = f"dtype {dtype} cannot be stored in safetensors; cast it to one of {known}"
        raise CheckpointError(message) from None


def dtype_from_name(name: str) -> np.dtype[Any]:
    """Returns the dtype a recipe or a config calls `"bfloat16"`, `"torch.float32"`, `"float8_e4m3fn"`, ...

    Raises:
        CheckpointError: the name is none of the types weights are stored in.
    """
    by_name = {str(dtype): dtype for dtype in _NAMES}
    try:
        return by_name[name.removeprefix("torch.")]
    except KeyError:
        hint = did_you_mean(name, by_name)
        message = f"unknown dtype {name!r}{hint}; the valid names are {', '.join(by_name)}"
        raise CheckpointError(message) from None


def promote(dtypes: Iterable[np.dtype[Any]]) -> np.dtype[Any]:
    """Returns the smallest dtype that holds every value of every one of `dtypes`.

    Equal dtypes stay as they are. Mixed floats: float16 with bfloat16 gives float32, float8 with a wider
    float gives the wider one, and two kinds of float8 give bfloat16.

    Raises:
        CheckpointError: no dtype at all, or different dtypes of which one is not a float.
    """
    kinds = frozenset(dtypes)
    if not kinds:
        raise CheckpointError("no dtype to promote: the group of tensors is empty; name at least one tensor")
    if len(kinds) == 1:
        return next(iter(kinds))
    strangers = sorted(str(dtype) for dtype in kinds - FLOATS)
    if strangers:
        found = ", ".join(sorted(str(dtype) for dtype in kinds))
        message = (
            f"dtypes {found} cannot be mixed because {strangers[0]} does not hold weights; "
            "give the models equal dtypes for this tensor"
        )
        raise CheckpointError(message)
    wide = kinds - _FLOAT8
    if len(wide) == 1:
        return next(iter(wide))
    if not wide:
        return SAFETENSORS["BF16"]
    return max(*wide, SAFETENSORS["F32"], key=lambda dtype: dtype.itemsize)
