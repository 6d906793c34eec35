"""`fisher`: an average that trusts each model most where its own likelihood depends most on the entry."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp

from mergelab.errors import OperatorError
from mergelab.operators.algebra import Arrays, Known, Reduction, algebraic
from mergelab.operators.arithmetic import coefficient, rounded
from mergelab.operators.compose import Merge
from mergelab.operators.declare import PerModel, Range, operator, total_weight, weights
from mergelab.operators.reductions import Mean
from mergelab.operators.region import Region

__all__ = ["FisherMean", "fisher"]


@algebraic
class FisherMean(Reduction):
    """`sum_m w_m (F_m + floor) x_m / sum_m w_m (F_m + floor)`, entry by entry, with diagonal Fishers `F_m`.

    Tensors that some model has no Fisher of, and entries whose sum is zero, take the mean weighted by `w`.
    """

    weight: Any = 1.0
    floor: Any = 1e-6

    per_model: ClassVar[tuple[str, ...]] = ("weight",)

    def apply(self, xs: Arrays, base: jax.Array | None, region: Region, known: Known) -> jax.Array:
        mean = Mean(self.weight).apply(xs, base, region, ())
        if region.statistics is None:
            return mean
        trust = [
            rounded(coefficient(self.weight, i) * (f.astype(jnp.float32) + coefficient(self.floor)))
            for i, f in enumerate(region.statistics)
        ]
        total = sum(trust[1:], trust[0])
        shares = [t / jnp.where(total > 0, total, jnp.float32(1)) for t in trust]
        weighed = [rounded(share * x) for share, x in zip(shares, xs, strict=True)]
        return jnp.where(total > 0, sum(weighed[1:], weighed[0]), mean)


@operator(
    base="optional",
    reference="Matena and Raffel, 'Merging models with Fisher-weighted averaging', arXiv 2111.09832",
    shares="always",
    statistics="fisher",
    helps="Models of different data with little of it at hand: entries weigh by what depends on them.",
)
def fisher(
    weight: Annotated[float, PerModel(), Range(0.0)] = 1.0, floor: Annotated[float, Range(0.0)] = 1e-6
) -> Merge:
    """Fisher-weighted average: each entry weighs as much as its model's likelihood depends on it.

    `floor` is added to every Fisher, so that entries no model depends on are averaged.

    Raises:
        OperatorError: all weights are zero.
    """
    if total_weight(weight) == 0:
        raise OperatorError("fisher: the weights sum to 0, so nothing is left to average; raise one.")
    return Merge((), FisherMean(weights(weight), weights(floor)))
