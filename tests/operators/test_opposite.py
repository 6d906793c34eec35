"""Vectors that cancel or point opposite ways: what rounding leaves of their difference is not magnified."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from mergelab import operators as ops
from tests.merging.streaming.test_stream_jobs import jobs_for, streamed

LENGTHS = (1, 2, 3)
ALONG: dict[str, dict[str, bool]] = {
    "all": {},
    "row": {"nuslerp_flatten": False},
    "column": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
}


def everywhere(merge: ops.Merge, models: list[Any], base: Any = None) -> dict[str, dict[str, np.ndarray]]:
    """The merge in memory, under `jit` (where sums are in float32) and streamed."""
    jitted = jax.jit(lambda xs, b: merge(xs, b))(models, base)
    found = {
        "memory": merge(models, base),
        "jit": jitted,
        "streamed": streamed(jobs_for(merge, models, base)),
    }
    return {how: {name: np.asarray(x) for name, x in tree.items()} for how, tree in found.items()}


def shaped(vector: np.ndarray, along: str) -> np.ndarray:
    return vector[:, None] if along == "column" else vector[None] if along == "row" else vector


@pytest.mark.parametrize("along", ALONG)
@pytest.mark.parametrize("factor", [-3.0, -0.37, 1.7])
def test_colinear_vectors_are_interpolated_on_their_line(factor: float, along: str) -> None:
    rng = np.random.default_rng(7)
    vectors = {str(n): rng.standard_normal(n).astype(np.float32) for n in LENGTHS}
    a = {n: shaped(v, along) for n, v in vectors.items()}
    b = {n: shaped((factor * v).astype(np.float32), along) for n, v in vectors.items()}
    for how, found in everywhere(ops.nuslerp(weight=[0.6, 0.5], **ALONG[along]), [a, b]).items():
        for n in a:
            right = (0.6 * a[n].astype(np.float64) + 0.5 * b[n]) / 1.1
            np.testing.assert_allclose(found[n], right, rtol=0, atol=1e-6, err_msg=how)


def test_recorded_values_of_mergekit() -> None:
    a, b = np.float32([[0.003, -0.016, -0.0092]]), np.float32([[-0.0184, -0.0065, 0.0375]])
    columns = ops.nuslerp(weight=[0.6, 0.5], **ALONG["column"])
    one = ops.nuslerp(weight=[0.6, 0.5])
    for found in everywhere(columns, [{"x": a}, {"x": b}]).values():
        np.testing.assert_allclose(found["x"], [[-0.00672727, -0.01168182, 0.01202727]], rtol=0, atol=1e-8)
    for found in everywhere(one, [{"x": a[0, :1]}, {"x": b[0, :1]}]).values():
        np.testing.assert_allclose(found["x"], [-0.00672727], rtol=0, atol=1e-8)


def test_task_vectors_of_single_elements_stay_near_the_base() -> None:
    """A gate `[1, h]` taken by columns: differences from the base round before they are compared."""
    rng = np.random.default_rng(3)
    base = rng.standard_normal((1, 32)).astype(np.float32)
    a, b = ((base + 0.01 * rng.standard_normal(base.shape)).astype(np.float32) for _ in range(2))
    merge = ops.nuslerp(weight=[0.6, 0.5], **ALONG["column"])
    right = base + (0.6 * (a.astype(np.float64) - base) + 0.5 * (b.astype(np.float64) - base)) / 1.1
    for found in everywhere(merge, [{"x": a}, {"x": b}], {"x": base}).values():
        np.testing.assert_allclose(found["x"], right, rtol=0, atol=1e-6)


def test_vectors_at_an_angle_still_take_the_arc() -> None:
    """Nearly opposite is not opposite: at .02 from it the middle of the arc is at right angles to both."""
    angle = np.pi - 0.02
    a, b = np.float32([1, 0]), np.float32([np.cos(angle), np.sin(angle)])
    middle = np.float64([np.cos(angle / 2), np.sin(angle / 2)])
    for along in ("all", "row"):
        models = [{"x": shaped(v, along)} for v in (a, b)]
        for found in everywhere(ops.nuslerp(weight=[1, 1], **ALONG[along]), models).values():
            np.testing.assert_allclose(found["x"].ravel(), middle, rtol=0, atol=1e-4)
    assert np.linalg.norm((a + b) / 2) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("size", [3, 1000])
def test_spherical_means_of_opposite_vectors_are_no_noise(size: int) -> None:
    """Exact cosines are -1; from float32 products they miss it by 1e-7, which is an angle of 3e-4."""
    a = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    b, one = (-0.37 * a).astype(np.float32), np.ones_like(a)
    near = {"rtol": 0, "atol": 2e-5}
    cases = [
        (ops.multislerp(weight=[0.5, 0.5]), [a, b], None, (a + b) / 2),
        (ops.karcher(), [a, b], None, (1.37 / 2) * a),
        (ops.karcher(), [a, 2 * a, b], None, (3.37 / 3) * a),
        (ops.model_stock(), [1 + a, 1 + b], one, one),
        (ops.slerp(t=0.3), [b], a, 0.7 * a + 0.3 * b),
    ]
    for merge, models, base, right in cases:
        trees = [{"x": x} for x in models]
        for how, found in everywhere(merge, trees, None if base is None else {"x": base}).items():
            np.testing.assert_allclose(found["x"], right, err_msg=f"{merge} {how}", **near)
