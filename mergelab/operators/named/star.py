"""`star`: task vectors cut to their leading singular directions, which keep the whole's nuclear norm."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Self

import jax.numpy as jnp

from mergelab.operators.algebra import Arrays, Granularity, Known, Stage, algebraic
from mergelab.operators.compose import Merge
from mergelab.operators.declare import Range, operator, weights
from mergelab.operators.low_rank import decomposed_in, exact_svd
from mergelab.operators.reductions import Mean
from mergelab.operators.region import Region, TensorInfo

__all__ = ["TruncateSpectrum", "star"]


@algebraic
class TruncateSpectrum(Stage):
    """Keeps each matrix's fewest singular triples that hold `eta` of the sum of all singular values, and one.

    What is kept is multiplied so that the sum is what it was. Tensors that are not matrices stay as they are.
    """

    eta: Any = 0.4
    matrix: bool = dataclasses.field(default=True, metadata={"static": True})

    @property
    def grain(self) -> Granularity:
        return "tensor" if self.matrix else "element"

    def at(self, tensor: TensorInfo) -> Self:
        return dataclasses.replace(self, matrix=tensor.role == "matrix")

    def workspace(self, shape: tuple[int, ...], models: int) -> int:
        """A matrix and its factors in float64, with what LAPACK needs to decompose it."""
        rows, columns = shape
        rank = min(shape)
        return 8 * (2 * rows * columns + rank * (rows + columns) + 5 * rank * rank)

    def apply(self, xs: Arrays, base: Any, region: Region, known: Known) -> Arrays:
        return tuple(self._truncated(x, region) for x in xs) if self.matrix else xs

    def _truncated(self, x: Any, region: Region) -> Any:
        left, singular, right = exact_svd(x.astype(decomposed_in(region.wide)))
        held = jnp.cumsum(singular)
        # The triple with which the fraction is reached, and, as in the authors' code, one more.
        enough = held >= held[-1] * jnp.asarray(self.eta, held.dtype)
        kept = jnp.arange(len(held)) <= jnp.argmax(enough)
        short = jnp.where(kept, singular, 0)
        total = jnp.sum(short)
        short = short * jnp.where(total > 0, held[-1] / jnp.where(total > 0, total, 1), 0)
        return jnp.matmul(left * short[None, :], right, precision="highest").astype(x.dtype)


@operator(
    base="required",
    reference="Lee et al., 'STAR', arXiv 2502.10339",
    helps="Many models, without a factor to search: its defaults are stable as models are added.",
)
def star(eta: Annotated[float, Range(0.0, 1.0)] = 0.4, lambda_: float = 1.0) -> Merge:
    """STAR: truncates each task vector's spectrum, rescales it to its nuclear norm, and averages.

    `B + lambda mean_i (|S_i|_1 / |S_i^k|_1) U_i^k S_i^k V_i^kT`, with the fewest k that hold `eta` of the
    singular values' sum. Small directions are noise that conflicts between tasks; helps most with many tasks.
    """
    return Merge((TruncateSpectrum(weights(eta)),), Mean(weights(1.0)), weights(lambda_))
