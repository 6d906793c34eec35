"""An embedding has many rows: nothing of rows by rows is made of a matrix, nor of columns by columns."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import pytest

from tests.operators.cases import CASES, build

LONG, SHORT = 6000, 6


def sizes(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    """The shapes of everything that a program computes, its inner programs included."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield getattr(variable.aval, "shape", ())
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from sizes(inner)


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_as_large_as_the_square_of_a_long_side(case: str) -> None:
    merge, count, with_base = build(case)
    for shape in ((LONG, SHORT), (SHORT, LONG)):
        model = {"w": jnp.zeros(shape, jnp.float32)}
        given = [model] * count, model if with_base else None
        largest = max(sizes(jax.make_jaxpr(merge)(*given).jaxpr), key=math.prod, default=())
        assert math.prod(largest) < LONG * LONG // 4, f"{list(largest)} of {list(shape)}"
