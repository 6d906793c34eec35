"""`sce`: select the entries that vary most over models, weigh models by energy, erase minority signs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from mergelab.operators.algebra import Arrays, Known, Reduction, Stage, algebraic
from mergelab.operators.arithmetic import rounded
from mergelab.operators.compose import Merge
from mergelab.operators.declare import Range, exact, operator
from mergelab.operators.measures import Measure, Rank, Sum
from mergelab.operators.order_statistics import kept_count, magnitude_key, selected
from mergelab.operators.region import Region
from mergelab.operators.stages import agree

__all__ = ["EnergyMean", "SelectVarying", "sce"]


@algebraic
class SelectVarying(Stage):
    """Keeps, in all models alike, the `int(topk * nnz)` entries whose variance over models is largest.

    `nnz` counts the entries whose (population) variance is not zero; ties go to the lowest index.
    """

    topk: Any

    def measures(self) -> tuple[Measure, ...]:
        return Sum(SelectVarying.nonzero), Rank(SelectVarying.keys, SelectVarying.kept)

    def variance(self, xs: Arrays) -> jax.Array:
        """Population variance over models, `[*block]`."""
        n = jnp.float32(len(xs))
        mean = sum(xs[1:], xs[0]) / n
        squares = [rounded((x - mean) * (x - mean)) for x in xs]
        return sum(squares[1:], squares[0]) / n

    def nonzero(self, xs: Arrays, base: Any, region: Region, known: Known) -> jax.Array:
        """How many entries vary at all."""
        return region.total(self.variance(tuple(jax.lax.stop_gradient(x) for x in xs)) != 0)

    def keys(self, xs: Arrays, base: Any, region: Region, known: Known) -> tuple[jax.Array, ...]:
        """Variances as sortable keys."""
        return (magnitude_key(self.variance(tuple(jax.lax.stop_gradient(x) for x in xs))),)

    def kept(self, known: Known, size: int, models: int) -> Sequence[Sequence[Any]]:
        """How many entries are kept."""
        varying = known[0]
        if isinstance(varying, Tracer) or isinstance(self.topk, Tracer):
            count = jnp.floor(
                varying.astype(jnp.float32) * jnp.asarray(self.topk, jnp.float32) * (1 + 2.0**-22)
            )
            return [[jnp.minimum(count, varying.astype(jnp.float32)).astype(jnp.uint32)]]
        return [[kept_count(self.topk, int(varying))]]

    def apply(self, xs: Arrays, base: jax.Array | None, region: Region, known: Known) -> Arrays:
        ((top,),) = known[1]
        keep = selected(self.keys(xs, base, region, known)[0], region, top)
        return tuple(jnp.where(keep, x, jnp.float32(0)) for x in xs)


@algebraic
class EnergyMean(Reduction):
    """Mean over the models that agree with the elected sign, weighted by each task vector's energy.

    `w_i = mean(x_i^2) / sum_j mean(x_j^2)` (uniform if the sum is below 1e-6), then
    `sum_i w_i x_i m_i / max(sum_i w_i m_i, 1e-6)`.
    """

    def measures(self) -> tuple[Measure, ...]:
        return (Sum(EnergyMean.energy, EnergyMean.shares),)

    def energy(self, xs: Arrays, base: Any, region: Region, known: Known) -> Any:
        """Sums of squares, and the number of entries (those of the tensor: padding would thin the means)."""
        return [region.total(x * x) for x in xs], region.elements()

    def shares(self, totals: Any) -> tuple[jax.Array, ...]:
        """The models' weights."""
        sums, size = totals
        means = [s / jnp.maximum(size, 1) for s in sums]
        total = sum(means[1:], means[0])
        small = jnp.abs(total) < 1e-6
        return tuple(
            jnp.where(small, 1 / len(means), m / jnp.where(small, 1, total)).astype(jnp.float32)
            for m in means
        )

    def apply(self, xs: Arrays, base: jax.Array | None, region: Region, known: Known) -> jax.Array:
        votes = sum(xs[1:], xs[0])
        elected = jnp.where(votes >= 0, jnp.float32(1), jnp.float32(-1))
        total, divisor = jnp.zeros_like(xs[0]), jnp.zeros_like(xs[0])
        for share, x in zip(known[0], xs, strict=True):
            mask = agree(x, elected)
            total = total + jnp.where(mask, rounded(share * x), jnp.float32(0))
            divisor = divisor + jnp.where(mask, share, jnp.float32(0))
        return total / jnp.maximum(divisor, jnp.float32(1e-6))


@operator(
    base="required",
    min_models=0,
    reference="Wan et al., 'FuseChat' (SCE), arXiv 2408.07990",
    helps="Several models that moved different matrices: each gets its share by how much it changed.",
)
def sce(int8_mask: bool = False, select_topk: Annotated[float, Range(0.0, 1.0, clips="both")] = 1.0) -> Merge:
    """Select (by variance), calculate (energy weights), erase (minority signs).

    `int8_mask` is accepted for compatibility and changes nothing.
    """
    keep_all = not isinstance(select_topk, Tracer) and select_topk >= 1
    stages = () if keep_all else (SelectVarying(exact(select_topk)),)
    return Merge(stages, EnergyMean())
