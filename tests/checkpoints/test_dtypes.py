"""Element types: names round-trip, promotion holds every value, mistakes are named."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest

from mergelab.checkpoints.dtypes import (
    FLOATS,
    SAFETENSORS,
    dtype_from_name,
    is_float,
    promote,
    safetensors_name,
)
from mergelab.errors import CheckpointError

BF16, F16, F32, F64 = (SAFETENSORS[name] for name in ("BF16", "F16", "F32", "F64"))


@pytest.mark.parametrize(("name", "dtype"), SAFETENSORS.items())
def test_names_round_trip(name: str, dtype: np.dtype) -> None:
    assert safetensors_name(dtype) == name
    assert dtype_from_name(str(dtype)) == dtype
    assert dtype_from_name(f"torch.{dtype}") == dtype


def test_what_counts_as_weights() -> None:
    assert is_float(BF16) and is_float(SAFETENSORS["F8_E4M3"])
    assert not is_float(SAFETENSORS["I64"]) and not is_float(SAFETENSORS["BOOL"])
    assert not is_float(SAFETENSORS["F8_E8M0"])


def test_errors_name_the_choices() -> None:
    with pytest.raises(CheckpointError, match=r"'bflaot16' \(did you mean 'bfloat16'\?\)"):
        dtype_from_name("bflaot16")
    with pytest.raises(CheckpointError, match="dtype complex128 cannot be stored"):
        safetensors_name(np.dtype(np.complex128))


@pytest.mark.parametrize(
    ("mixed", "expected"),
    [
        ([BF16, BF16], BF16),
        ([BF16, F16], F32),
        ([BF16, F32], F32),
        ([F32, F64, F16], F64),
        ([SAFETENSORS["F8_E4M3"], BF16], BF16),
        ([SAFETENSORS["F8_E4M3"], SAFETENSORS["F8_E5M2"]], BF16),
        ([SAFETENSORS["I64"], SAFETENSORS["I64"]], SAFETENSORS["I64"]),
    ],
)
def test_promotion(mixed: list[np.dtype], expected: np.dtype) -> None:
    assert promote(mixed) == promote(reversed(mixed)) == expected


@pytest.mark.parametrize(("a", "b"), [*itertools.combinations(sorted(FLOATS, key=str), 2)])
def test_promotion_keeps_every_finite_value(a: np.dtype, b: np.dtype) -> None:
    wide = promote([a, b])
    for dtype in (a, b):
        info = ml_dtypes.finfo(dtype)
        extremes = [info.max, info.smallest_subnormal, 1 + float(info.eps)]
        values = np.array([float(v) for v in extremes], np.float64).astype(dtype)
        assert np.array_equal(values.astype(wide).astype(np.float64), values.astype(np.float64))


def test_types_that_do_not_mix() -> None:
    with pytest.raises(CheckpointError, match="bfloat16, int64 cannot be mixed because int64"):
        promote([BF16, SAFETENSORS["I64"]])
    with pytest.raises(CheckpointError, match="empty"):
        promote([])
