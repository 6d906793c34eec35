"""`iso_c`: the summed task vector with all its singular values made equal."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mergelab.operators.algebra import Arrays, algebraic
from mergelab.operators.compose import Merge
from mergelab.operators.declare import operator, weights
from mergelab.operators.low_rank import polar_and_singular
from mergelab.operators.whole_matrices import MatrixReduction

__all__ = ["Isotropic", "iso_c"]


@algebraic
class Isotropic(MatrixReduction):
    """`mean(S) U V^T` of `sum_i x_i = U diag(S) V^T`; tensors that are not matrices are averaged.

    The mean is over all `min(m, n)` singular values; directions whose singular value is zero to rounding
    are not directions of the sum and stay zero.
    """

    def workspace(self, shape: tuple[int, ...], models: int) -> int:
        """The sum and its factors in float64, with what LAPACK needs to decompose it."""
        rows, columns = shape
        rank = min(shape)
        return 8 * (rows * columns + rank * (rows + columns) + 5 * rank * rank)

    def of_matrices(self, deltas: Arrays) -> jax.Array:
        factor, singular = polar_and_singular(sum(deltas[1:], deltas[0]))
        return jnp.mean(singular) * factor


@operator(
    base="required",
    reference="Marczak et al., 'No Task Left Behind' (Iso-C), arXiv 2502.04959",
    helps="Many tasks: a flat spectrum lets weak tasks through; tune its factor, it likes a large one.",
)
def iso_c(lambda_: float = 1.0) -> Merge:
    """Isotropic merging: the sum of the task vectors, with its singular values replaced by their mean.

    `B + lambda mean(S) U V^T` of `sum_i x_i = U S V^T`. Gives directions that few tasks use as much room as
    shared ones; helps with several tasks, and costs one decomposition of each matrix.
    """
    return Merge((), Isotropic(), weights(lambda_))
