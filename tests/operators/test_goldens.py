"""Every recorded edge case of mergekit: the same numbers, or a sentence where it crashes or gives NaN."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors

from mergelab import operators as ops
from mergelab.errors import OperatorError
from tests.operators import reference
from tests.slow import slow_except

# float32, the same bits
# fmt: off
EXACT = [
    "slerp_t0.0", "slerp_t1.0", "slerp_parallel", "slerp_anti", "slerp_cos0.9996", "slerp_zero_both",
    "slerp_scalar", "nuslerp_same", "nuslerp_zero", "karcher_allzero", "mstock_zero", "mstock_opposed",
    "ties", "ties_zero", "ties_density0", "ties_density_tiny", "ties_densitygt1", "ties_cancel", "ties_wneg",
    "ties_w0", "ties_div_cancel", "ties_int8", "ties_single", "ties_baseonly", "ties_lambda", "ties_1elem",
    "ta_wsum0_norm", "ta_mixed", "dare_density0", "della_density0", "bread_small_gamma", "bread_gamma.3",
    "bread_over", "bread_d0", "bread_gamma1", "bread_ties", "near", "near_t0", "near_same", "near_tneg",
    "sce0", "sce_zero", "sce_same", "ram", "ramplus", "ramplus_nounique", "arcee", "arcee_same", "arcee_1d",
    "pass_scale",
]
# fmt: on

# float32, sums in another order
# fmt: off
CLOSE = [
    "slerp_t0.3", "slerp_t1.5", "slerp_t-0.2", "slerp_base1", "slerp_cos0.9994", "slerp_zero_a", "slerp_tiny",
    "nuslerp", "nuslerp_anti", "nuslerp_w0", "nuslerp_wneg", "nuslerp_rows_zero", "nuslerp_rowwise",
    "nuslerp_base", "nuslerp_base_zero_delta", "nuslerp_cos0.99999", "nuslerp_1d_rowwise", "multislerp",
    "multislerp_same", "multislerp_anti2", "multislerp_onezero", "multislerp_single_base", "karcher",
    "karcher_same", "karcher_zero1", "karcher_anti", "karcher_small", "karcher_iter0", "mstock",
    "mstock_same", "mstock_cos-.5_N3", "mstock_fw", "mstock_fw1d", "ties_rescale", "sce", "sce.5",
    "sce_small", "linear",
]
# fmt: on

# refused in one sentence; mergekit raises, too, save for the two sums of weights: there it writes NaN, inf
REFUSED = {
    "slerp_1model": "exactly 1 model.* besides the base, but got 0",
    "slerp_nobase": "relative to a base model: pass `base`",
    "slerp_shape": r"'t' has shape \(5, 8\) in model 0 but \(6, 8\)",
    "multislerp_antipodal4": "directions of tensor 't' sum to zero",
    "multislerp_zero": "directions of tensor 't' sum to zero",
    "multislerp_wsum0": "the weights sum to 0.*`normalize_weights: false`",
    "mstock_2": "at least 2 model.* besides the base, but got 1",
    "della_range": "density 0.9 with epsilon 0.15 leaves .* choose epsilon below 0.1",
    "linear_wsum0": "the weights sum to 0.*`normalize: false`",
    "pass_2": "exactly 1 model.*, but got 2",
}

HALF: dict[str, Callable[..., np.ndarray]] = {
    "slerp_bf16": lambda xs, b, p: reference.slerp(b, xs[0], p["t"]),
    "slerp_f16": lambda xs, b, p: reference.slerp(b, xs[0], p["t"]),
    "nuslerp_bf16": lambda xs, b, p: reference.slerp(xs[0], xs[1], p["weight"][1] / sum(p["weight"])),
    "multislerp_bf16": lambda xs, b, p: reference.multislerp(xs, p["weight"]),
    "karcher_bf16": lambda xs, b, p: reference.karcher(xs),
    "linear_bf16": lambda xs, b, p: reference.linear(xs, p["weight"]),
    "ties_bf16": lambda xs, b, p: reference.ties(xs, b, p["weight"], p["density"]),
    "ties_f16": lambda xs, b, p: reference.ties(xs, b, p["weight"], p["density"]),
    "arcee_bf16": lambda xs, b, p: reference.arcee_fusion(xs[0], b),
}

# judged in tests of their own, with the reasons there
APART = ["multislerp_anti2_base", "della_col1", "della_1elem", "linear_int"]


@dataclass(frozen=True)
class Case:
    """One recorded call: inputs, and what mergekit made of them (None where it raised)."""

    operator: ops.Operator
    parameters: dict[str, Any]
    models: list[np.ndarray]
    base: np.ndarray | None
    out: np.ndarray | None

    def run(self, cast: Any = None) -> np.ndarray:
        models = [{"t": x if cast is None else x.astype(cast)} for x in self.models]
        base = self.base if cast is None or self.base is None else self.base.astype(cast)
        merge = self.operator(**self.parameters)
        return np.asarray(merge(models, None if base is None else {"t": base})["t"])


@pytest.fixture(scope="module")
def recorded(goldens: Path) -> dict[str, Case]:
    entries = json.loads((goldens / "op_goldens.json").read_text(encoding="utf-8"))
    with safetensors.safe_open(goldens / "op_goldens.safetensors", "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return {entry["name"]: _case(entry, tensors) for entry in entries}


def _case(entry: dict[str, Any], tensors: dict[str, np.ndarray]) -> Case:
    operator = ops.OPERATORS[entry["method"]]
    inputs = [tensors[f"{entry['name']}.in{i}"] for i in range(entry["n"])]
    parameters = {operator.parameter(name).keyword: value for name, value in entry["params"].items()}  # type: ignore[union-attr]
    base = None if operator.base == "as_input" else entry["base_index"]
    models = [x for i, x in enumerate(inputs) if i != base]
    for parameter in operator.parameters:
        if parameter.required and parameter.per_model and not models:
            parameters.setdefault(parameter.keyword, [])
    out = tensors.get(f"{entry['name']}.out")
    return Case(operator, parameters, models, None if base is None else inputs[base], out)


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    """Within 5e-7 for weights of order 1, and within as small a part of smaller ones."""
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-7 * min(1.0, float(np.abs(expected).max())))


def assert_within_ulps(
    found: np.ndarray, expected: np.ndarray, ulps: int, dtype: Any, operands: list[np.ndarray]
) -> None:
    """Within some units in the last place that `dtype` has at the largest number taking part."""
    numbers = [np.abs(x.astype(np.float64)) for x in (found, expected, *operands)]
    exponent = np.floor(np.log2(np.maximum.reduce(numbers)))
    error = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    assert (error <= ulps * 2.0 ** (exponent - ml_dtypes.finfo(dtype).nmant)).all()


def test_every_recorded_case_is_judged_once(recorded: dict[str, Case]) -> None:
    judged = [*EXACT, *CLOSE, *REFUSED, *HALF, *APART]
    assert sorted(judged) == sorted(recorded)
    assert len(judged) == 111


@pytest.mark.parametrize("name", EXACT)
def test_the_same_bits(name: str, recorded: dict[str, Case]) -> None:
    case = recorded[name]
    found = case.run()
    assert case.out is not None
    assert found.dtype == case.out.dtype
    np.testing.assert_array_equal(found, case.out)


@pytest.mark.parametrize("name", CLOSE)
def test_the_same_to_rounding(name: str, recorded: dict[str, Case]) -> None:
    case = recorded[name]
    assert case.out is not None
    assert_close(case.run(), case.out)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_a_sentence(name: str, recorded: dict[str, Case]) -> None:
    case = recorded[name]
    assert case.out is None or not np.isfinite(case.out).any()
    with pytest.raises(OperatorError, match=REFUSED[name]):
        case.run()


@pytest.mark.parametrize("name", HALF)
def test_half_precision_is_float32_maths_rounded_once(name: str, recorded: dict[str, Case]) -> None:
    case = recorded[name]
    assert case.out is not None
    dtype = case.models[0].dtype
    wide = case.run(np.float32)
    truth = HALF[name](
        [x.astype(np.float64) for x in case.models],
        None if case.base is None else case.base.astype(np.float64),
        case.parameters,
    )
    np.testing.assert_allclose(wide, truth, rtol=0, atol=5e-7 * np.abs(truth).max())
    found = case.run()
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, wide.astype(dtype))
    # mergekit rounds every step to the half dtype, so its error goes with the numbers it adds, not their sum
    operands = [*case.models, *([] if case.base is None else [case.base])]
    assert_within_ulps(case.out, found, 2, dtype, operands)


def test_cancelling_directions_give_the_weighted_sum(recorded: dict[str, Case]) -> None:
    """The two deltas are opposite up to the rounding of `X - B`, so their mean direction is noise.

    Its length is 2.4e-8; mergekit, whose limit is 1e-8, normalizes it and returns a point in a random
    direction. Directions shorter than 1e-6, float32's resolution, fall back to the weighted sum here.
    """
    case = recorded["multislerp_anti2_base"]
    assert case.base is not None and case.out is not None
    weighted_sum = case.base + sum((x - case.base) / 2 for x in case.models)
    assert_close(case.run(), weighted_sum)
    assert np.abs(case.out - weighted_sum).max() > 1


@pytest.mark.parametrize("name", slow_except(["della_1elem"], ["della_col1", "della_1elem"]))
def test_a_row_of_one_entry_is_kept_with_probability_density(name: str, recorded: dict[str, Case]) -> None:
    """Mergekit divides by max - min = 0 there and crashes; one entry is the middle of its row's ranks."""
    case = recorded[name]
    (x, _), base = case.models, case.base
    assert case.out is None and base is not None
    merge = ops.della_linear(weight=1.0, density=0.5, rescale=False)
    draws = 100
    kept = np.stack([merge([{"t": x}], {"t": base}, seed=seed)["t"] for seed in range(draws)]) != base
    sigma = np.sqrt(0.25 / (draws * x.size))
    assert abs(kept.mean() - 0.5) < 4 * sigma
    assert np.isfinite(case.run()).all()


def test_integers_are_copied_where_equal_and_refused_where_not(recorded: dict[str, Case]) -> None:
    case = recorded["linear_int"]
    assert case.out is None
    first = case.models[0]
    merge = case.operator(**case.parameters)
    np.testing.assert_array_equal(merge([{"t": first}, {"t": first.copy()}])["t"], first)
    with pytest.raises(OperatorError, match=r"'t' is not floating point \(int64\) and differs"):
        merge([{"t": first}, {"t": first + 1}])


def test_a_wrong_output_would_be_seen(recorded: dict[str, Case]) -> None:
    out = recorded["karcher"].out
    assert out is not None
    swapped = out[[1, 0, *range(2, len(out))]]
    with pytest.raises(AssertionError):
        assert_close(swapped, out)
    with pytest.raises(AssertionError):
        assert_close(out + np.float32(1e-6), out)
    with pytest.raises(AssertionError):
        assert_within_ulps(out * np.float32(1 + 2**-5), out, 2, ml_dtypes.bfloat16, [])
    assert_within_ulps(out * np.float32(1 + 2**-8), out, 2, ml_dtypes.bfloat16, [])
