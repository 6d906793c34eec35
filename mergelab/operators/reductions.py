"""Reductions: maps of all models' deltas to one (weighted sums and means, and sums by their Gram matrix)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mergelab.operators.algebra import Arrays, Known, Reduction, algebraic
from mergelab.operators.arithmetic import add_scaled, coefficient, rounded
from mergelab.operators.measures import Measure, Sum
from mergelab.operators.region import Region

__all__ = [
    "DisjointMean",
    "GramReduction",
    "Mean",
    "WeightedSum",
    "combine",
    "resolution",
    "safe_arccos",
    "safe_sqrt",
]


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


def combine(coefficients: Any, xs: Arrays) -> jax.Array:
    """`sum_i c_i x_i`, in model order."""
    total = None
    for c, x in zip(coefficients, xs, strict=True):
        total = add_scaled(total, c, x)
    assert total is not None
    return total


def resolution(dtype: Any) -> float:
    """The length below which a difference of unit vectors is rounding noise.

    In float64 that is the rounding of the float32 inputs themselves; float32 sums cancel only to the square
    root of their own error.
    """
    return 1e-6 if dtype == jnp.float64 else 1e-3


def safe_sqrt(x: jax.Array) -> jax.Array:
    """Square root with derivative 0 at 0, and of negative rounding noise 0."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


def safe_arccos(x: jax.Array) -> jax.Array:
    """Arc cosine of a value clipped to [-1, 1], with derivative 0 at the ends."""
    inside = jnp.abs(x) < 1
    end = jnp.where(x > 0, 0.0, jnp.pi).astype(x.dtype)
    return jnp.where(inside, jnp.arccos(jnp.where(inside, x, 0)), end)


class GramReduction(Reduction):
    """A reduction that implements `solve(gram)`; the base, if it takes part, is row 0.

    Subclasses set `with_base` when the base model is itself one of the combined vectors (and the merge does
    not work on deltas).
    """

    with_base = False

    def vectors(self, xs: Arrays, base: jax.Array | None) -> Arrays:
        """The arrays that are combined."""
        return (base, *xs) if self.with_base and base is not None else xs

    def measures(self) -> tuple[Measure, ...]:
        solve, kind = type(self).solve, type(self)
        return Sum(kind.gram, solve), Sum(kind.exact_gram, solve, needed=lambda _, known: bool(known[0][1]))

    def gram(self, xs: Arrays, base: Any, region: Region, known: Known) -> jax.Array:
        """Inner products of all pairs, `[models, models]`, from products rounded to float32."""
        return self._pairs(self.vectors(xs, base), lambda x, y: region.total(x * y))

    def exact_gram(self, xs: Arrays, base: Any, region: Region, known: Known) -> jax.Array:
        """The same from products in the wide dtype."""
        return self._pairs(self.vectors(xs, base), region.dot)

    def _pairs(self, vectors: Arrays, inner: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
        upper = {
            (i, j): inner(vectors[i], vectors[j]) for i in range(len(vectors)) for j in range(i, len(vectors))
        }
        return jnp.stack(
            [
                jnp.stack([upper[min(i, j), max(i, j)] for j in range(len(vectors))])
                for i in range(len(vectors))
            ]
        )

    def solve(self, gram: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """One float32 coefficient per vector, and whether they need a Gram matrix of exact products."""
        raise NotImplementedError

    @staticmethod
    def coefficients(known: Known) -> tuple[jax.Array, ...]:
        """The coefficients from the best Gram matrix there is."""
        rough, exact = known
        return (rough if exact is None else exact)[0]

    def apply(self, xs: Arrays, base: jax.Array | None, region: Region, known: Known) -> jax.Array:
        return combine(self.coefficients(known), self.vectors(xs, base))
