"""`lines`: task vectors scaled by depth, so that first blocks stay near the base."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from mergelab.operators.algebra import Arrays, Granularity, Known, Reduction, algebraic
from mergelab.operators.arithmetic import coefficient, rounded
from mergelab.operators.compose import Merge
from mergelab.operators.declare import PerModel, operator, weights
from mergelab.operators.measures import Measure, of_inner
from mergelab.operators.reductions import WeightedSum
from mergelab.operators.region import Region, TensorInfo

__all__ = ["DepthScaled", "depth_scaled", "lines"]


@algebraic
class DepthScaled(Reduction):
    """The result of `inner` times `alpha + beta depth`.

    Depth runs from 0 in the first block to 1 in the last, and is 0 in tensors of no block. Without `alpha` it
    is one over the number of models.
    """

    inner: Reduction
    beta: Any
    alpha: Any = None
    depth: Any = np.float32(0)

    @property
    def grain(self) -> Granularity:
        return self.inner.grain

    def at(self, tensor: TensorInfo) -> Self:
        return dataclasses.replace(self, inner=self.inner.at(tensor), depth=np.float32(tensor.depth))

    def workspace(self, shape: tuple[int, ...], models: int) -> int:
        return self.inner.workspace(shape, models)

    def check_models(self, models: int, operator: str) -> None:
        self.inner.check_models(models, operator)

    def check(self, known: Known, name: str) -> None:
        self.inner.check(known, name)

    def measures(self) -> tuple[Measure, ...]:
        return tuple(of_inner(measure) for measure in self.inner.measures())

    def apply(self, xs: Arrays, base: jax.Array | None, region: Region, known: Known) -> jax.Array:
        alpha = jnp.float32(1 / len(xs)) if self.alpha is None else coefficient(self.alpha)
        factor = alpha + rounded(coefficient(self.beta) * coefficient(self.depth))
        return factor * self.inner.apply(xs, base, region, known)


def depth_scaled(merge: Merge, *, beta: Any, alpha: Any = None) -> Merge:
    """Any merge of task vectors, its task vector scaled by depth (LiNeS).

    Args:
        merge: one that works on differences from the base, such as `ties(...)`.
        beta: what is added to the factor from the first block to the last.
        alpha: the factor of the first block, and of what is in no block; one over the number of models if
            None.

    Example:
        >>> from mergelab import operators as ops
        >>> merge = ops.depth_scaled(ops.ties(weight=1.0, density=0.2), alpha=0.3, beta=0.7)
    """
    scaled = DepthScaled(merge.reduce, weights(beta), None if alpha is None else weights(alpha))
    return dataclasses.replace(merge, reduce=scaled)


@operator(
    base="required",
    reference="Wang et al., 'LiNeS', arXiv 2410.17146",
    helps="General models to be kept: shallow layers, which hold what is common, change least.",
)
def lines(
    beta: float,
    weight: Annotated[Any, PerModel()] = 1.0,
    alpha: float | None = None,
    lambda_: float = 1.0,
) -> Merge:
    """LiNeS: task arithmetic whose factor grows with depth, from `alpha` to `alpha + beta`.

    `B + lambda (alpha + beta l / (L - 1)) sum_i w_i x_i` in block l of L, and `alpha` outside the blocks;
    without `alpha` it is one over the number of models. Keeps what the first blocks have in common, so that
    less is forgotten. Scales any merge by `depth_scaled(merge, ...)` in Python; in a recipe, any operator's
    `lambda` may be the gradient `[alpha, alpha + beta]`.
    """
    merge = Merge((), WeightedSum(weights(weight)), weights(lambda_))
    return depth_scaled(merge, beta=beta, alpha=alpha)
