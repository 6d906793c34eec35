"""`model_stock`: how far to go from the base towards the mean, by the angle between task vectors."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mergelab.operators.algebra import Arrays, Granularity, Known, Reduction, algebraic
from mergelab.operators.arithmetic import rounded, row_sum
from mergelab.operators.compose import Merge
from mergelab.operators.declare import operator
from mergelab.operators.measures import Measure, Sum
from mergelab.operators.reductions import safe_sqrt
from mergelab.operators.region import Region

__all__ = ["ModelStock", "model_stock"]


@algebraic
class ModelStock(Reduction):
    """`t mean(X) + (1 - t) B` with `t = N c / (1 + (N-1) c)`, c the mean pairwise cosine of `X_i - B`.

    `filter_wise` takes the angle row by row (last axis) instead of over the whole tensor. `t` is 0 where
    its denominator is below 1e-6 (of a float32 sum, 1e-5), and is not clamped.
    """

    filter_wise: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def grain(self) -> Granularity:
        return "row" if self.filter_wise else "element"

    def measures(self) -> tuple[Measure, ...]:
        if self.filter_wise:
            return ()
        exact = Sum(ModelStock.exact_products, ModelStock.ratio, needed=lambda _, known: bool(known[0][1]))
        return Sum(ModelStock.products, ModelStock.ratio), exact

    def products(self, xs: Arrays, base: Any, region: Region, known: Known) -> Any:
        """Squared norms of the deltas, and inner products of all pairs."""
        return self._products([rounded(x - base) for x in xs], lambda x, y: region.total(x * y))

    def exact_products(self, xs: Arrays, base: Any, region: Region, known: Known) -> Any:
        """The same with nothing rounded before it is added up."""
        return self._products([rounded(x - base) for x in xs], region.dot)

    def _products(self, deltas: list[jax.Array], inner: Any) -> Any:
        pairs = {
            (i, j): inner(deltas[i], deltas[j]) for i in range(len(deltas)) for j in range(i + 1, len(deltas))
        }
        return [inner(d, d) for d in deltas], [pairs[key] for key in sorted(pairs)]

    def ratio(self, totals: Any) -> tuple[jax.Array, jax.Array]:
        """The interpolation ratio t, and whether its denominator is so small that exact products matter."""
        squares, products = totals
        n = len(squares)
        norms = [safe_sqrt(s) for s in squares]
        pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
        cosines = [
            jnp.clip(p / jnp.maximum(norms[i] * norms[j], 1e-6), -1, 1)
            for p, (i, j) in zip(products, pairs, strict=True)
        ]
        cosine = sum(cosines[1:], cosines[0]) / len(pairs)
        denominator = 1 + rounded((n - 1) * cosine)
        degenerate = jnp.abs(denominator) < (1e-6 if denominator.dtype == jnp.float64 else 1e-5)
        t = jnp.where(degenerate, 0, n * cosine / jnp.where(degenerate, 1, denominator))
        return t.astype(jnp.float32), jnp.abs(denominator) < 0.05

    def apply(self, xs: Arrays, base: jax.Array | None, region: Region, known: Known) -> jax.Array:
        assert base is not None
        if self.filter_wise:
            deltas = [rounded(x - base) for x in xs]
            t, _ = self.ratio(self._products(deltas, lambda x, y: row_sum(rounded(x * y))))
        else:
            rough, exact = known
            t, _ = rough if exact is None else exact
        mean = sum(xs[1:], xs[0]) / jnp.float32(len(xs))
        return rounded(t * mean) + rounded((1 - t) * base)


@operator(
    base="required",
    min_models=2,
    reference="Jang et al., 'Model Stock', arXiv 2403.19522",
    lone="base",
    absent="omit",
    helps="Two or three fine-tunes of one task, as an estimate of what averaging many would give.",
)
def model_stock(filter_wise: bool = False) -> Merge:
    """Interpolates between the base and the models' mean by the geometry of their differences."""
    return Merge((), ModelStock(filter_wise), deltas=False)
