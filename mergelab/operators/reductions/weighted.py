"""Sums and means over models."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mergelab.operators.algebra import Arrays, Known, Reduction, algebraic
from mergelab.operators.arithmetic import add_scaled, coefficient, rounded
from mergelab.operators.region import Region

__all__ = ["DisjointMean", "Mean", "WeightedSum"]


def _weighted(xs: Arrays, weight: Any) -> jax.Array:
    total = None
    for i, x in enumerate(xs):
        total = add_scaled(total, coefficient(weight, i), x)
    assert total is not None
    return total


def _weight_sum(weight: Any, models: int) -> jax.Array:
    total = coefficient(weight, 0)
    for i in range(1, models):
        total = total + coefficient(weight, i)
    return total


@algebraic
class WeightedSum(Reduction):
    """`sum_i w_i x_i`."""

    weight: Any = 1.0

    transparent: ClassVar[bool] = True

    per_model: ClassVar[tuple[str, ...]] = ("weight",)

    def apply(self, xs: Arrays, base: jax.Array | None, region: Region, known: Known) -> jax.Array:
        return _weighted(xs, self.weight)


@algebraic
class Mean(Reduction):
    """`sum_i w_i x_i / sum_i w_i`; a weight sum below 1e-8 in magnitude divides by 1 instead."""

    weight: Any = 1.0

    transparent: ClassVar[bool] = True

    per_model: ClassVar[tuple[str, ...]] = ("weight",)

    def apply(self, xs: Arrays, base: jax.Array | None, region: Region, known: Known) -> jax.Array:
        divisor = _weight_sum(self.weight, len(xs))
        return rounded(_weighted(xs, self.weight)) / jnp.where(
            jnp.abs(divisor) < 1e-8, jnp.float32(1), divisor
        )


@algebraic
class DisjointMean(Reduction):
    """`sum_i w_i x_i / sum of w_i over the models whose entry is not zero`; a zero sum divides by 1.

    Reference: Yadav et al., "TIES-Merging", arXiv 2306.01708.
    """

    weight: Any = 1.0

    per_model: ClassVar[tuple[str, ...]] = ("weight",)

    def apply(self, xs: Arrays, base: jax.Array | None, region: Region, known: Known) -> jax.Array:
        divisor = jnp.zeros_like(xs[0])
        for i, x in enumerate(xs):
            w = coefficient(self.weight, i)
            divisor = divisor + jnp.where(rounded(w * x) != 0, w, jnp.float32(0))
        return rounded(_weighted(xs, self.weight)) / jnp.where(divisor == 0, jnp.float32(1), divisor)
