"""`opcm`: models merged one after another, each without what the merge so far already holds."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mergelab.operators.algebra import Arrays, Granularity, Known, Reduction, algebraic
from mergelab.operators.compose import Merge
from mergelab.operators.declare import Range, operator, weights
from mergelab.operators.low_rank import decomposed_in, exact_svd
from mergelab.operators.measures import Measure, Sum
from mergelab.operators.region import Region, TensorInfo

__all__ = ["OrthogonalSequence", "opcm"]

Matrix = Float[Array, "rows columns"]


@algebraic
class OrthogonalSequence(Reduction):
    """`p_T mean_i |x_i| / |p_T|`, norms over the whole tree, of `p_1 = x_1, p_t = p_(t-1) + cleaned(x_t)`.

    Of a matrix `cleaned` takes, in the singular bases of `p_(t-1)`, all diagonal entries and the block of the
    leading directions that hold `alpha` of the singular values' sum; other tensors stay as they are. The
    method rescales after every model; bases do not depend on that, so it is done once, at the end.
    """

    alpha: Any = 0.5
    matrix: bool = dataclasses.field(default=True, metadata={"static": True})

    @property
    def grain(self) -> Granularity:
        return "tensor" if self.matrix else "element"

    def at(self, tensor: TensorInfo) -> Self:
        return dataclasses.replace(self, matrix=tensor.role == "matrix")

    def workspace(self, shape: tuple[int, ...], models: int) -> int:
        """The merge so far, its factors and products with them in float64, with LAPACK's own."""
        rows, columns = shape
        rank = min(shape)
        return 8 * (4 * rows * columns + rank * (rows + 2 * columns) + 6 * rank * rank)

    def measures(self) -> tuple[Measure, ...]:
        return (Sum(OrthogonalSequence.squares, OrthogonalSequence.scale, scope="tree"),)

    def squares(self, xs: Arrays, base: Any, region: Region, known: Known) -> tuple[Any, Any]:
        """Squared norms of the models' task vectors and of the sequence's end."""
        return [region.total(x * x) for x in xs], region.total(jnp.square(self._sequence(xs, region)))

    def scale(self, totals: Any) -> jax.Array:
        """The factor that gives the end the mean of the models' norms."""
        own, end = totals
        norms = [jnp.sqrt(square) for square in own]
        mean = sum(norms[1:], norms[0]) / len(norms)
        return jnp.where(end > 0, mean / jnp.sqrt(jnp.where(end > 0, end, 1)), 0).astype(jnp.float32)

    def apply(self, xs: Arrays, base: jax.Array | None, region: Region, known: Known) -> jax.Array:
        return known[0] * self._sequence(xs, region)

    def _sequence(self, xs: Arrays, region: Region) -> jax.Array:
        if not self.matrix:
            return sum(xs[1:], xs[0])
        merged = xs[0].astype(decomposed_in(region.wide))
        for x in xs[1:]:
            merged = merged + self._cleaned(x.astype(merged.dtype), merged)
        return merged.astype(xs[0].dtype)

    def _cleaned(self, x: Matrix, merged: Matrix) -> Matrix:
        left, singular, right = exact_svd(merged)
        held = jnp.cumsum(singular)
        # The first direction beyond alpha belongs to the rest, as in the authors' code.
        leading = jnp.arange(len(held)) < jnp.argmax(held > held[-1] * jnp.asarray(self.alpha, held.dtype))
        taken = (leading[:, None] & leading[None, :]) | jnp.eye(len(held), dtype=bool)
        inside = _product(_product(left.T, x), right.T)
        return x - _product(_product(left, jnp.where(taken, inside, 0)), right)


def _product(a: Matrix, b: Matrix) -> Matrix:
    return jnp.matmul(a, b, precision="highest")


@operator(
    base="required",
    reference="Tang et al., 'Merging models on the fly' (OPCM), arXiv 2501.09522",
    helps="Models that come one after the other and of which only the merge so far is kept.",
)
def opcm(alpha: Annotated[float, Range(0.0, 1.0)] = 0.5, lambda_: float = 1.0) -> Merge:
    """OPCM: models merged in their order, each projected off what the merge so far holds.

    `B + lambda c p_T`: matrices enter without their diagonal and leading block (`alpha` of the spectrum) in
    the singular bases of the sum so far, and the factor c gives the result the mean norm of the task vectors.
    Meant for models that arrive one after another; the order matters.
    """
    return Merge((), OrthogonalSequence(weights(alpha)), weights(lambda_))
