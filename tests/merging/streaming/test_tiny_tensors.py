"""Tensors far smaller than a block: what is streamed in padded blocks is what is merged in memory."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from mergelab import operators as ops
from mergelab.compat import enable_x64
from mergelab.merging.engine.blocks import blocks_of
from mergelab.operators.algebra import measure_block
from mergelab.operators.measures import Sum
from mergelab.operators.region import Region
from tests.merging.streaming.test_stream_jobs import jobs_for, streamed
from tests.operators import reference
from tests.operators.cases import CASES, LIGHT, build
from tests.slow import slow_except

TINY = {"scalar": (), "four": (4,), "row": (1, 3)}


Tree = dict[str, np.ndarray]


def tiny(case: str, scale: float) -> tuple[ops.Merge, list[Tree], Tree | None]:
    """A case's merge, and models whose differences are about `scale`."""
    merge, count, with_base = build(case)
    rng = np.random.default_rng(5)
    # Random draws take long to compile for each shape.
    shapes = {name: TINY[name] for name in (("row",) if case.startswith(("dare", "della")) else TINY)}
    base = {name: np.asarray(rng.standard_normal(shape), np.float32) for name, shape in shapes.items()}
    models = [
        {name: np.asarray(x + scale * rng.standard_normal(x.shape), np.float32) for name, x in base.items()}
        for _ in range(count)
    ]
    return merge, models, base if with_base else None


def test_every_operator_has_a_case() -> None:
    assert {name for name, *_ in CASES.values()} == set(ops.OPERATORS)


@pytest.mark.parametrize("case", slow_except(LIGHT, CASES))
def test_a_tiny_tensor_streamed_is_the_tensor_merged_in_memory(case: str) -> None:
    merge, models, base = tiny(case, 0.02)  # mean squares of 4e-4: padding would push them below sce's 1e-6
    found = streamed(jobs_for(merge, models, base), threads=1)
    expected = merge(models, base)
    for name in models[0]:
        np.testing.assert_allclose(
            found[name], np.asarray(expected[name]), rtol=2e-6, atol=2e-7, err_msg=name
        )


# Whole tensors are never padded.
@pytest.mark.parametrize("case", [case for case in CASES if build(case)[0].grain != "tensor"])
def test_padding_adds_nothing_to_a_sum(case: str) -> None:
    merge, count, with_base = build(case)
    (block,) = blocks_of((4,), merge.grain)
    zeros = np.zeros(block.shape, np.float32)
    nothing = Region(
        np.zeros(2, np.uint32), np.zeros(2, np.uint32), block.shape, "float64", True, np.uint32(0)
    )
    known: list[list[Any]] = [[] for _ in merge.parts]
    for part, measure, declared in merge.steps():
        if not isinstance(declared, Sum) or known[part] or any(known[:part]):
            known[part].append(None)  # what builds on other measures is judged by the streamed merge above
            continue
        with enable_x64(True):
            totals = measure_block(
                merge,
                (jax.numpy.asarray(zeros),) * count,
                jax.numpy.asarray(zeros) if with_base else None,
                nothing,
                tuple(map(tuple, known)),
                part=part,
                measure=measure,
            )
        known[part].append(None)
        assert all(not np.any(np.asarray(total)) for total in jax.tree.leaves(totals)), declared


ZEROS = np.zeros(4, np.float32)
SMALL = [np.float32([0.01, 0.01, 0.02, 0]), np.float32([0.03, -0.01, 0.02, 0.04])]


@pytest.mark.parametrize("arguments", [{}, {"select_topk": 1}])
def test_energies_are_means_over_the_tensor_not_over_its_block(arguments: dict[str, Any]) -> None:
    """By hand: mean squares 1.5e-4 and 7.5e-4, so weights 1/6 and 5/6; mergekit gives the same."""
    merge = ops.sce(**arguments)
    right = [0.16 / 6, 0.01, 0.02, 0.04]
    (jobs,) = [jobs_for(merge, [{"x": x} for x in SMALL], {"x": ZEROS})]
    np.testing.assert_allclose(streamed(jobs)["x"], right, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(merge(SMALL, ZEROS)), right, rtol=1e-6)
    uniform = [0.02, 0.01, 0.02, 0.04]  # what means over a block of 2^18 elements come to
    assert np.abs(np.subtract(uniform, right)).max() > 5e-3


@pytest.mark.parametrize("shape", [(1,), (3,), (4,), (4, 1)])
def test_the_smallest_value_is_a_quartile_of_few_values(shape: tuple[int, ...]) -> None:
    base, x = np.random.default_rng(1).standard_normal((2, *shape)).astype(np.float32)
    x = (base + 0.1 * x).astype(np.float32)
    right = reference.arcee_fusion(x.astype(np.float64), base.astype(np.float64)).astype(np.float32)
    merge = ops.arcee_fusion()
    found = streamed(jobs_for(merge, [{"x": x}], {"x": base}))["x"]
    np.testing.assert_array_equal(found, right)
    np.testing.assert_array_equal(np.asarray(merge([x], base)), right)
    if shape in ((1,), (4, 1)):
        assert (right != base).any()  # an empty selection would give the base
