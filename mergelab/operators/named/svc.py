"""`svc`: the summed task vector without the surplus along directions that tasks share."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp

from mergelab.operators.algebra import Arrays, algebraic
from mergelab.operators.compose import Merge
from mergelab.operators.declare import PerModel, Range, operator, weights
from mergelab.operators.low_rank import exact_svd
from mergelab.operators.reductions import WeightedSum
from mergelab.operators.region import Region
from mergelab.operators.whole_matrices import MatrixReduction

__all__ = ["CalibratedSum", "svc"]


@algebraic
class CalibratedSum(MatrixReduction):
    """`U diag(g S) V^T` of `sum_i w_i x_i = U S V^T`; tensors that are not matrices are summed alone.

    `g_r = T / sum_i max(alpha, s_ri)`, where `s_ri = <a_r, a_ri> / |a_ri|^2` says how much of task i's own
    response `a_ri = u_r^T x_i` the sum's `a_r = S_r v_r^T` holds: above 1 it is counted more than once.
    """

    weight: Any = 1.0
    alpha: Any = 1.0

    per_model: ClassVar[tuple[str, ...]] = ("weight",)

    def workspace(self, shape: tuple[int, ...], models: int) -> int:
        """The sum, its factors and a task's responses in float64, with what LAPACK needs for one matrix."""
        rows, columns = shape
        rank = min(shape)
        return 8 * (2 * rows * columns + rank * (rows + 3 * columns) + 5 * rank * rank)

    def of_others(self, xs: Arrays, region: Region) -> jax.Array:
        return WeightedSum(self.weight).apply(xs, None, region, ())

    def of_matrices(self, deltas: Arrays) -> jax.Array:
        weight = jnp.broadcast_to(jnp.asarray(self.weight, deltas[0].dtype), (len(deltas),))
        left, singular, right = exact_svd(
            sum(w * x for w, x in zip(weight[1:], deltas[1:], strict=True)) + weight[0] * deltas[0]
        )
        surplus = jnp.zeros_like(singular)
        for delta in deltas:
            response = jnp.matmul(left.T, delta, precision="highest")
            own = jnp.sum(response * response, axis=1)
            held = singular * jnp.sum(response * right, axis=1)
            share = jnp.where(own > 0, held / jnp.where(own > 0, own, 1), 0)
            surplus = surplus + jnp.maximum(share, jnp.asarray(self.alpha, share.dtype))
        gain = len(deltas) / jnp.where(surplus > 0, surplus, 1)
        return jnp.matmul(left * (gain * singular)[None, :], right, precision="highest")


@operator(
    base="required",
    reference="Li et al., 'When shared knowledge hurts' (SVC), arXiv 2602.05536",
    helps="Tasks that share directions, which a sum would count once for each.",
)
def svc(
    weight: Annotated[Any, PerModel()] = 1.0,
    alpha: Annotated[float, Range(0.0)] = 1.0,
    lambda_: float = 1.0,
) -> Merge:
    """SVC: task arithmetic whose singular values are divided by how often tasks count a direction.

    `B + lambda U diag(g S) V^T` of the weighted sum of the task vectors. Helps where tasks share directions,
    whose sum is inflated; with `alpha` below 1 directions that the weights have damped are raised again.
    """
    return Merge((), CalibratedSum(weight=weights(weight), alpha=weights(alpha)), weights(lambda_))
