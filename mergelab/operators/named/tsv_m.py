"""`tsv_m`: the task vectors' leading singular vectors, orthogonal to each other before they are added."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mergelab.operators.algebra import Arrays, algebraic
from mergelab.operators.compose import Merge
from mergelab.operators.declare import operator, weights
from mergelab.operators.low_rank import LowRank, exact_svd, polar_factor
from mergelab.operators.whole_matrices import MatrixReduction

__all__ = ["TaskSingularVectors", "leading_directions", "tsv_m"]

Matrix = Float[Array, "rows columns"]


@algebraic
class TaskSingularVectors(MatrixReduction):
    """`polar([U_1 ... U_T]) diag(S_1 ... S_T) polar([V_1 ... V_T])^T` of the task vectors' leading triples.

    Each of the T matrices contributes its `min(m, n) // T` largest singular triples; the polar factors are
    the nearest matrices with orthonormal columns, so that no task's directions interfere with another's.
    Tensors that are not matrices, or have fewer rows or columns than there are tasks, are averaged.
    """

    def workspace(self, shape: tuple[int, ...], models: int) -> int:
        """All models' factors in float64, with what LAPACK needs for one decomposition."""
        rows, columns = shape
        rank = min(shape)
        factors = max(models, 3) * rank * (rows + columns)
        return 8 * (2 * rows * columns + factors + 5 * rank * rank)

    def of_matrices(self, deltas: Arrays) -> jax.Array | None:
        return leading_directions(deltas)


def leading_directions(
    deltas: Sequence[Matrix], decompose: Callable[..., LowRank] = exact_svd
) -> Matrix | None:
    """The matrices' leading triples, made orthogonal and added; None where there is none for each."""
    rank = min(deltas[0].shape) // len(deltas)
    if rank == 0:
        return None
    factors = [decompose(x, rank=rank) for x in deltas]
    left = polar_factor(jnp.concatenate([f.left for f in factors], axis=1))
    right = polar_factor(jnp.concatenate([f.right for f in factors], axis=0))
    singular = jnp.concatenate([f.singular for f in factors])
    return jnp.matmul(left * singular[None, :], right, precision="highest")


@operator(
    base="required",
    reference="Gargiulo et al., 'Task Singular Vectors' (TSV-Merge), arXiv 2412.00081",
    helps="Many tasks of full rank, without data; best of those without data in our experiments.",
)
def tsv_m(lambda_: float = 1.0) -> Merge:
    """TSV-Merge: adds the tasks' leading singular directions, each made orthogonal to all others.

    `B + lambda polar([U_1 ... U_T]) diag(S_1 ... S_T) polar([V_1 ... V_T])^T` of the `min(m, n) // T` leading
    triples of each task vector. Needs no data; the best data-free operator here with many tasks.
    """
    return Merge((), TaskSingularVectors(), weights(lambda_))
