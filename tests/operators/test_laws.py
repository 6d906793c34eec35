"""What must be true of merges whatever the weights: symmetries, limits, norms, identities, elections."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergelab import operators as ops
from mergelab.errors import OperatorError
from mergelab.operators.arithmetic import add_scaled, row_sum
from tests.compilation import AS_USERS
from tests.operators import reference
from tests.operators.cases import CASES, build

SHAPE = (6, 8)
RNG = np.random.default_rng(0)
BASE = RNG.standard_normal(SHAPE).astype(np.float32)
MODELS = [(BASE + 0.5 * RNG.standard_normal(SHAPE)).astype(np.float32) for _ in range(3)]


def apply(
    merge: ops.Merge, models: list[np.ndarray], base: np.ndarray | None = None, seed: int = 0
) -> np.ndarray:
    """The merge of single tensors."""
    tree = merge([{"t": m} for m in models], None if base is None else {"t": base}, seed=seed)
    return np.asarray(tree["t"])


SYMMETRIC = {
    "linear": ({"weight": [0.5, 0.3, 0.4]}, False),
    "uniform": ({}, False),
    "karcher": ({}, False),
    "multislerp": ({"weight": [1, 2, 0.5]}, True),
    "model_stock": ({}, True),
    "task_arithmetic": ({"weight": [0.5, 0.3, -0.4]}, True),
    "ties": ({"weight": [1.0, 0.5, 0.25], "density": [0.5, 0.3, 0.7]}, True),
    "breadcrumbs_ties": (
        {"weight": [1.0, 0.5, 0.25], "density": [0.5, 0.3, 0.7], "gamma": [0, 0.1, 0.2]},
        True,
    ),
    "sce": ({"select_topk": 0.5}, True),
    "ram": ({"epsilon": 0.3}, True),
    "ramplus_tl": ({"epsilon": 0.3}, True),
    "consensus": ({"agree": 2}, True),
    "magmax": ({}, True),
    "emr": ({}, True),
}


@pytest.mark.parametrize("name", SYMMETRIC)
def test_the_order_of_models_does_not_matter(name: str) -> None:
    arguments, with_base = SYMMETRIC[name]
    results = []
    for order in permutations(range(3)):
        permuted = {k: [v[i] for i in order] if isinstance(v, list) else v for k, v in arguments.items()}
        merge = ops.OPERATORS[name](**permuted)
        results.append(apply(merge, [MODELS[i] for i in order], BASE if with_base else None))
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], rtol=0, atol=1e-6)


def test_weights_that_stay_behind_would_be_seen() -> None:
    merge = ops.linear(weight=[0.5, 0.3, 0.4])
    assert np.abs(apply(merge, MODELS) - apply(merge, MODELS[::-1])).max() > 1e-2


# Merging copies of one model gives that model; `linear_raw` and `passthrough` scale, on purpose.
IDEMPOTENT = [
    "linear", "uniform", "slerp", "nuslerp", "nuslerp_base", "nuslerp_row", "nuslerp_column", "multislerp",
    "karcher", "model_stock", "model_stock_filter", "nearswap", "arcee_fusion", "sce", "ram",
]  # fmt: skip


@pytest.mark.parametrize("case", IDEMPOTENT)
def test_copies_of_one_model_merge_to_that_model(case: str) -> None:
    merge, models, with_base = build(case)
    copies = apply(merge, [MODELS[0]] * models, MODELS[0] if with_base else None)
    np.testing.assert_allclose(copies, MODELS[0], rtol=0, atol=1e-6)


WITH_BASE = [case for case, (_, _, with_base, _) in CASES.items() if with_base and case != "multislerp_base"]


@pytest.mark.parametrize("case", WITH_BASE)
def test_models_equal_to_the_base_leave_it_alone(case: str) -> None:
    merge, models, _ = build(case)
    exact = case not in {"slerp", "nearswap", "model_stock", "model_stock_filter"}  # c X + (1 - c) X rounds
    found = apply(merge, [BASE] * models, BASE)
    np.testing.assert_allclose(found, BASE, rtol=0, atol=0 if exact else 1e-6)


def test_a_sphere_of_differences_needs_differences() -> None:
    """As in mergekit: there is no direction among deltas that are all zero."""
    with pytest.raises(OperatorError, match="all-zero or antipodal"):
        apply(ops.multislerp(weight=1.0), [BASE] * 3, BASE)


@pytest.mark.parametrize("name", ["ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs",
                                  "breadcrumbs_ties", "task_arithmetic"])  # fmt: skip
def test_lambda_zero_and_weight_zero_give_the_base(name: str) -> None:
    operator = ops.OPERATORS[name]
    for arguments in ({"weight": 0.5, "lambda_": 0.0}, {"weight": [0.0] * 3}):
        np.testing.assert_array_equal(apply(operator(density=0.5, **arguments), MODELS, BASE), BASE)


@pytest.mark.parametrize("name", ["dare_linear", "della_linear", "breadcrumbs"])
def test_density_one_is_task_arithmetic_and_density_zero_the_base(name: str) -> None:
    weight = [0.5, 0.3, -0.4]
    expected = apply(ops.task_arithmetic(weight=weight), MODELS, BASE)
    np.testing.assert_array_equal(
        apply(ops.OPERATORS[name](weight=weight, density=1.0), MODELS, BASE), expected
    )
    np.testing.assert_array_equal(apply(ops.OPERATORS[name](weight=weight, density=0.0), MODELS, BASE), BASE)


@given(st.floats(-2, 2, width=32), st.integers(0, 2))
def test_a_model_of_weight_zero_is_not_there(weight: float, absent: int) -> None:
    weights = [weight] * 3
    weights[absent] = 0.0
    others = [m for i, m in enumerate(MODELS) if i != absent]
    for operator in (ops.task_arithmetic, ops.ties):
        with_it = apply(operator(weight=weights), MODELS, BASE)
        np.testing.assert_array_equal(with_it, apply(operator(weight=[weight] * 2), others, BASE))


def test_slerp_and_the_line_of_wise_ft_begin_and_end_at_their_models() -> None:
    x = MODELS[0]
    for build_at in (lambda t: ops.slerp(t=t), lambda t: ops.wise_ft(alpha=t)):
        np.testing.assert_array_equal(apply(build_at(0.0), [x], BASE), BASE)
        np.testing.assert_allclose(apply(build_at(1.0), [x], BASE), x, rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        apply(ops.wise_ft(alpha=1.5), [x], BASE), 1.5 * x.astype(np.float64) - 0.5 * BASE, rtol=0, atol=1e-6
    )
    np.testing.assert_array_equal(apply(ops.nearswap(t=0.0), [x], BASE), BASE)


@given(st.floats(0, 1, width=32), st.integers(0, 2**16))
def test_slerp_keeps_the_norm_of_equally_long_models(t: float, seed: int) -> None:
    a, b = np.random.default_rng(seed).standard_normal((2, *SHAPE))
    a, b = (3 * v / np.linalg.norm(v) for v in (a, b))
    out = apply(ops.slerp(t=t), [b.astype(np.float32)], a.astype(np.float32)).astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(out), 3, rtol=1e-6)
    np.testing.assert_allclose(out, reference.slerp(a, b, t), rtol=0, atol=1e-6)
    if 0.1 < t < 0.9:
        assert np.linalg.norm((1 - t) * a + t * b) < 2.95  # a straight line is shorter


@given(st.floats(-3, 3, width=32))
def test_adding_a_task_and_negating_it_gives_the_base_back(weight: float) -> None:
    delta = MODELS[0] - BASE
    added = apply(ops.task_arithmetic(weight=weight), [MODELS[0]], BASE)
    np.testing.assert_allclose(added, BASE + np.float64(weight) * delta, rtol=0, atol=1e-6)
    removed = apply(ops.task_arithmetic(weight=-weight), [added + delta], added)
    np.testing.assert_allclose(removed, BASE, rtol=0, atol=2e-6)


def test_a_plus_what_b_learned_is_b_plus_what_a_learned() -> None:
    a, b = MODELS[:2]
    one = apply(ops.task_arithmetic(weight=1.0), [a, b], BASE)
    np.testing.assert_allclose(one, a + (b - BASE), rtol=0, atol=1e-6)
    np.testing.assert_allclose(one, b + (a - BASE), rtol=0, atol=1e-6)


def elect(deltas: list[list[float]], **arguments: Any) -> list[float]:
    """TIES at density 1 of 1-D deltas over a base of zeros."""
    models = [np.asarray(d, np.float32) for d in deltas]
    return apply(ops.ties(weight=1.0, **arguments), models, np.zeros_like(models[0])).tolist()


def test_the_heavier_sign_is_elected() -> None:
    assert elect([[0.3, -0.3], [-0.2, 0.2]]) == pytest.approx([0.3, -0.3])
    assert elect([[3.0], [-1.0], [-1.0]]) == [3.0]
    assert elect([[3.0], [-1.0], [-1.0]], elect="count") == [-1.0]


def test_a_tie_goes_to_plus_to_the_majority_or_to_nobody() -> None:
    deltas = [[0.5, -1.0, -2.0], [-0.5, -1.0, -2.0]]
    assert elect(deltas) == [0.5, -1.0, -2.0]
    assert elect(deltas, tie="majority") == [-0.5, -1.0, -2.0]
    assert elect(deltas, tie="skip") == [0.0, -1.0, -2.0]
    assert elect([[0.5, 1.0], [-0.5, 1.0]], tie="majority") == [0.5, 1.0]


def test_ties_over_the_whole_tree_is_ties_of_the_flattened_vector() -> None:
    shapes = {"a": (3, 5), "b": (7,), "c": (2, 2, 2)}
    rng = np.random.default_rng(2)
    base, *models = (
        {k: rng.integers(-4, 5, s).astype(np.float32) for k, s in shapes.items()} for _ in range(4)
    )
    weight, density = [1.0, 0.5, 0.25], [0.2, 0.4, 0.3]
    merged = ops.ties(weight=weight, density=density, scope="tree")(models, base)

    def flat(tree: Any) -> np.ndarray:
        return np.concatenate([np.asarray(tree[k], np.float64).ravel() for k in shapes])

    expected = reference.ties([flat(m) for m in models], flat(base), weight, density)
    np.testing.assert_allclose(flat(merged), expected, rtol=0, atol=1e-6)
    per_tensor = ops.ties(weight=weight, density=density)(models, base)
    assert np.abs(flat(per_tensor) - expected).max() > 0.1


def test_equal_magnitudes_keep_the_lowest_index() -> None:
    x = np.array([1, -2, 2, -2, 2, 1, 3, 0], np.float32)
    merge = ops.chain(ops.Trim(0.5), ops.WeightedSum())
    np.testing.assert_array_equal(apply(merge, [x], np.zeros_like(x)), [0, -2, 2, -2, 0, 0, 3, 0])


@pytest.mark.parametrize("name", ["karcher", "multislerp", "model_stock"])
def test_spherical_means_are_those_of_float64(name: str) -> None:
    wide = [m.astype(np.float64) for m in MODELS]
    found, expected = {
        "karcher": lambda: (apply(ops.karcher(), MODELS), reference.karcher(wide)),
        "multislerp": lambda: (
            apply(ops.multislerp(weight=[1, 2, 3]), MODELS),
            reference.multislerp(wide, [1, 2, 3]),
        ),
        "model_stock": lambda: (
            apply(ops.model_stock(), MODELS, BASE),
            reference.model_stock(wide, BASE.astype(np.float64)),
        ),
    }[name]()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_model_stock_of_orthogonal_task_vectors_stays_at_the_base() -> None:
    deltas = np.linalg.qr(RNG.standard_normal((48, 3)))[0].T.reshape(3, *SHAPE)
    found = apply(ops.model_stock(), [(BASE + d).astype(np.float32) for d in deltas], BASE)
    np.testing.assert_allclose(found, BASE, rtol=0, atol=1e-6)


def test_row_sums_are_as_good_as_float64_and_independent_of_the_rows_beside_them() -> None:
    x = np.random.default_rng(0).standard_normal((5, 1001)).astype(np.float32) + 100
    found = np.asarray(jax.jit(row_sum)(jnp.asarray(x)))
    np.testing.assert_allclose(found[:, 0], x.astype(np.float64).sum(1), rtol=3e-7)
    np.testing.assert_array_equal(found[2:3], np.asarray(jax.jit(row_sum)(jnp.asarray(x[2:3]))))
    assert (
        np.abs(np.cumsum(x, axis=1)[:, -1] - x.astype(np.float64).sum(1)).max() > 3e-7 * 1e5
    )  # in index order


def test_no_compiler_fuses_a_product_into_a_sum() -> None:
    """Task arithmetic under jit has the bits of numpy float32, operation by operation."""
    rng = np.random.default_rng(0)
    base, a, b = (rng.standard_normal(100_000).astype(np.float32) for _ in range(3))
    weights, scale = np.float32([0.3, -0.7]), np.float32(0.9)
    total = weights[0] * (a - base) + weights[1] * (b - base)
    expected = base + total * scale
    merge = ops.task_arithmetic(weight=weights, lambda_=float(scale))
    compiled = jax.jit(lambda m, x: merge(m, x), compiler_options=AS_USERS)
    np.testing.assert_array_equal(compiled([{"t": a}, {"t": b}], {"t": base})["t"], expected)
    fused = (weights[1].astype(np.float64) * (b - base) + weights[0] * (a - base)).astype(np.float32)
    assert (fused != total).any()  # one rounding instead of two is a different number


def test_starting_a_sum_adds_nothing_to_it() -> None:
    x = jnp.asarray([-0.0, 1.0], jnp.float32)
    first = np.asarray(add_scaled(None, jnp.float32(1), x))
    assert np.signbit(first).tolist() == [True, False]
