"""`regmean`: the matrix whose outputs are nearest to all models' own, each on the inputs it is used to."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mergelab.operators.algebra import Arrays, Granularity, Known, Reduction, algebraic
from mergelab.operators.compose import Merge
from mergelab.operators.declare import Range, operator, weights
from mergelab.operators.low_rank import decomposed_in
from mergelab.operators.reductions import Mean
from mergelab.operators.region import Region, TensorInfo

__all__ = ["RegressionMean", "regmean"]


@algebraic
class RegressionMean(Reduction):
    """`(sum_m W_m G_m) (sum_m G_m)^-1` with Gram matrices `G_m`, the mean over tokens of `x x^T`.

    That minimizes `sum_m mean |W x - W_m x|^2` over each model's own inputs `x`. The Gram matrices'
    off-diagonal entries are multiplied by `off_diagonal`. Directions that no input has, and tensors that some
    model has no Gram matrix of, take the models' mean.
    """

    off_diagonal: Any = 1.0
    whole: bool = dataclasses.field(default=True, metadata={"static": True})
    reads: int = dataclasses.field(default=1, metadata={"static": True})

    @property
    def grain(self) -> Granularity:
        return "tensor" if self.whole else "element"

    def at(self, tensor: TensorInfo) -> Self:
        reads = 1 if tensor.reads is None else tensor.reads
        return dataclasses.replace(self, whole=tensor.statistics, reads=reads)

    def workspace(self, shape: tuple[int, ...], models: int) -> int:
        """Bytes in float64 of a Gram matrix, the sum and its factor, and five matrices of the shape."""
        return 8 * (4 * shape[self.reads] ** 2 + 5 * shape[0] * shape[1])

    def apply(self, xs: Arrays, base: jax.Array | None, region: Region, known: Known) -> jax.Array:
        mean = Mean().apply(xs, base, region, ())
        if region.statistics is None:
            return mean
        dtype = decomposed_in(region.wide)
        turn = (lambda x: x.T) if self.reads == 0 else (lambda x: x)
        middle = sum((x.astype(dtype) for x in xs[1:]), xs[0].astype(dtype)) / len(xs)
        total = residual = None
        for x, statistic in zip(xs, region.statistics, strict=True):
            gram = statistic.astype(dtype)
            kept = jnp.where(jnp.eye(len(gram), dtype=bool), 1, jnp.asarray(self.off_diagonal, dtype))
            gram = gram * kept.astype(dtype)
            one = jnp.matmul(turn(x.astype(dtype) - middle), gram, precision="highest")
            total = gram if total is None else total + gram
            residual = one if residual is None else residual + one
        assert total is not None and residual is not None
        return (middle + turn(_divided(residual, total))).astype(jnp.float32)


def _divided(y: Float[Array, "out in"], gram: Float[Array, "in in"]) -> Float[Array, "out in"]:
    """`y gram^-1` for rows of `y` in the range of `gram`, which need not have full rank.

    Features are brought to unit scale first: their magnitudes differ by powers of ten. A ridge of the size of
    a float32 Gram matrix's rounding keeps the factor real, and two refinements take its bias out again.
    """
    diagonal = jnp.diagonal(gram)
    present = diagonal > 0
    scale = jnp.where(present, 1 / jnp.sqrt(jnp.where(present, diagonal, 1)), 0).astype(gram.dtype)
    unit = gram * scale[:, None] * scale[None, :]
    unit = (unit + unit.T) / 2
    y = y * scale[None, :]
    ridge = len(gram) * 2.0**-22
    factor = jnp.linalg.cholesky(unit + ridge * jnp.eye(len(gram), dtype=gram.dtype))

    def refined(_: None) -> jax.Array:
        def solve(rows: jax.Array) -> jax.Array:
            return jax.scipy.linalg.cho_solve((factor, True), rows.T).T

        found = solve(y)
        for _step in range(2):
            found = found + solve(y - jnp.matmul(found, unit, precision="highest"))
        return found

    def projected(_: None) -> jax.Array:
        values, vectors = jnp.linalg.eigh(unit)
        kept = values > ridge
        inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0).astype(gram.dtype)
        turned = jnp.matmul(y, vectors, precision="highest") * inverse[None, :]
        return jnp.matmul(turned, vectors.T, precision="highest")

    return jax.lax.cond(jnp.all(jnp.isfinite(factor)), refined, projected, None) * scale[None, :]


@operator(
    base="optional",
    reference="Jin et al., 'Dataless knowledge fusion' (RegMean), arXiv 2212.09849",
    statistics="gram",
    helps="Models of different data, of which some text is at hand: a forward pass over it weighs inputs.",
)
def regmean(off_diagonal: Annotated[float, Range(0.0, 1.0)] = 1.0) -> Merge:
    """RegMean: least squares between the merged matrix's outputs and each model's on its own inputs.

    All models count alike, however many tokens their Gram matrices are means of. Below 1, `off_diagonal`
    brings the solution nearer to an average weighted by each feature's energy.
    """
    return Merge((), RegressionMean(weights(off_diagonal)))
