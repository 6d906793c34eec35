"""`iso_cts`: the sum's leading directions and each task's own, all with the same singular value."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from mergelab.errors import OperatorError
from mergelab.operators.algebra import Arrays, algebraic
from mergelab.operators.compose import Merge
from mergelab.operators.declare import Range, is_concrete, operator, weights
from mergelab.operators.low_rank import exact_svd, polar_factor
from mergelab.operators.whole_matrices import MatrixReduction

__all__ = ["CommonAndTaskSpecific", "iso_cts"]


@algebraic
class CommonAndTaskSpecific(MatrixReduction):
    """`mean(S) polar([U_c U_1 ... U_T]) polar([V_c V_1 ... V_T])^T`, averaged where there is no matrix.

    `U_c, S_c, V_c` are the k leading singular triples of `sum_i x_i`; those of task i are the `(q - k) / T`
    leading ones of `x_i - U_c U_c^T x_i`, with `q = min(rows, columns)` and k near `q common_space_fraction`,
    so that all q are shared out. The mean is over all of them; directions whose singular value is zero to
    rounding stay zero.
    """

    common_space_fraction: float = dataclasses.field(default=0.8, metadata={"static": True})

    def workspace(self, shape: tuple[int, ...], models: int) -> int:
        """All chosen factors and their polar factors in float64, with what LAPACK takes for one matrix."""
        rows, columns = shape
        rank = min(shape)
        return 8 * (3 * rows * columns + 3 * rank * (rows + columns) + 5 * rank * rank)

    def shares(self, rank: int, models: int) -> tuple[int, int]:
        """How many of `rank` directions are common, and how many each task's own."""
        # As the authors' code rounds, but never to more directions than there are.
        own = round((rank - int(rank * self.common_space_fraction)) / models)
        own = min(own, rank // models)
        return rank - own * models, own

    def of_matrices(self, deltas: Arrays) -> jax.Array:
        total = sum(deltas[1:], deltas[0])
        common, own = self.shares(min(total.shape), len(deltas))
        factors = [exact_svd(total, rank=common)]
        shared = factors[0].left
        for delta in deltas if own else ():
            inside = jnp.matmul(shared.T, delta, precision="highest")
            rest = delta - jnp.matmul(shared, inside, precision="highest")
            factors.append(exact_svd(rest, jnp.linalg.norm(delta), own))
        left = polar_factor(jnp.concatenate([f.left for f in factors], axis=1))
        right = polar_factor(jnp.concatenate([f.right for f in factors], axis=0))
        singular = jnp.concatenate([f.singular for f in factors])
        return jnp.mean(singular) * jnp.matmul(left, right, precision="highest")


@operator(
    base="required",
    reference="Marczak et al., 'No Task Left Behind' (Iso-CTS), arXiv 2502.04959",
    helps="Many tasks that share little: each keeps directions of its own beside the common ones.",
)
def iso_cts(lambda_: float = 1.0, common_space_fraction: Annotated[float, Range(0.0, 1.0)] = 0.8) -> Merge:
    """Iso-CTS: Iso-C that gives a share of the directions to what each task has beside the common space.

    `B + lambda mean(S) polar([U_c U_1 ... U_T]) polar([V_c V_1 ... V_T])^T`: the sum's leading directions,
    and of each task its leading ones outside their span. Helps over `iso_c` where there are many tasks, whose
    own directions are lost in the sum.

    Raises:
        OperatorError: `common_space_fraction` is traced: it decides shapes.
    """
    if not is_concrete(common_space_fraction):
        raise OperatorError(
            "iso_cts: `common_space_fraction` decides how many singular vectors are kept, so it must be a "
            "plain number under jit, vmap and grad; trace `lambda_` only."
        )
    reduce = CommonAndTaskSpecific(common_space_fraction=float(common_space_fraction))
    return Merge((), reduce, weights(lambda_))
