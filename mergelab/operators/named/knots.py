"""`knots` and `core_space`: low-rank task vectors merged in bases that all of them share."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mergelab.operators.algebra import Arrays, algebraic
from mergelab.operators.compose import Merge
from mergelab.operators.declare import PerModel, Range, operator, weights
from mergelab.operators.low_rank import polar_factor, resolved_svd
from mergelab.operators.named.tsv_m import leading_directions
from mergelab.operators.whole_matrices import MatrixReduction

__all__ = ["CoreSpace", "SharedColumns", "core_space", "knots"]

Matrix = Float[Array, "rows columns"]
Density = Annotated[float, Range(0.0, 1.0)]


def _product(a: Matrix, b: Matrix) -> Matrix:
    return jnp.matmul(a, b, precision="highest")


def _ties(ys: list[Matrix], weight: Any, density: Any, size: Int[Array, ""]) -> Matrix:
    """TIES of coordinates: trim to `density` of `size` entries, elect signs, average those that agree."""
    wide = ys[0].dtype
    w = jnp.broadcast_to(jnp.asarray(weight, wide), (len(ys),))
    # As `Trim` counts, with a nudge that keeps whole products whole.
    count = jnp.floor(jnp.asarray(density, wide) * size.astype(wide) * (1 + 1e-6)).astype(jnp.int32)
    kept = []
    for y in ys:
        ascending = jnp.sort(jnp.abs(y).reshape(-1))
        least = ascending[jnp.clip(ascending.size - count, 0, ascending.size - 1)]
        kept.append(jnp.where(jnp.abs(y) >= least, y, 0))
    votes = [one * y for one, y in zip(w, kept, strict=True)]
    elected = jnp.where(sum(votes[1:], votes[0]) >= 0, 1, -1).astype(wide)
    total, divisor = jnp.zeros_like(ys[0]), jnp.zeros_like(ys[0])
    for one, vote in zip(w, votes, strict=True):
        agrees = (vote * elected > 0).astype(wide)
        total, divisor = total + vote * agrees, divisor + one * agrees
    return total / jnp.where(divisor == 0, 1, divisor)


@algebraic
class SharedColumns(MatrixReduction):
    """`U ties(U^T x_1, ..., U^T x_T)`, U the left singular vectors of the matrices side by side.

    Tensors that are not matrices are averaged.
    """

    weight: Any = 1.0
    density: Any = 1.0

    per_model: ClassVar[tuple[str, ...]] = ("weight",)

    def workspace(self, shape: tuple[int, ...], models: int) -> int:
        """The matrices side by side, their factors and coordinates in float64, with LAPACK's own."""
        rows, columns = shape
        rank = min(rows, models * columns)
        return 8 * (3 * models * rows * columns + rank * (rows + 3 * models * columns) + 5 * rank * rank)

    def of_matrices(self, deltas: Arrays) -> jax.Array:
        basis, singular, _ = resolved_svd(jnp.concatenate(deltas, axis=1))
        inside = [_product(basis.T, x) for x in deltas]
        size = jnp.count_nonzero(singular) * deltas[0].shape[1]
        return _product(basis, _ties(inside, self.weight, self.density, size))


Method = Literal["ties", "tsv_m", "iso_c"]


@algebraic
class CoreSpace(MatrixReduction):
    """`U merge(U^T x_1 V, ..., U^T x_T V) V^T` with bases U of all columns and V of all rows.

    The merge within is TIES, TSV-Merge, or the sum with singular values that are their mean over the core's
    directions. The bases are singular vectors of the matrices side by side and stacked; the authors take
    those of stacked factors, which depend on how each product is split into two, and agree where bases do not
    matter (`tsv_m`, `iso_c`). Tensors that are not matrices are averaged.
    """

    weight: Any = 1.0
    density: Any = 1.0
    method: Method = dataclasses.field(default="ties", metadata={"static": True})

    per_model: ClassVar[tuple[str, ...]] = ("weight",)

    def workspace(self, shape: tuple[int, ...], models: int) -> int:
        """The matrices twice, side by side and stacked, with their factors in float64, and LAPACK's own."""
        rows, columns = shape
        rank = min(models * rows, models * columns)
        return 8 * (3 * models * rows * columns + 3 * models * rank * (rows + columns) + 5 * rank * rank)

    def of_matrices(self, deltas: Arrays) -> jax.Array:
        left, across, _ = resolved_svd(jnp.concatenate(deltas, axis=1))
        _, down, right = resolved_svd(jnp.concatenate(deltas, axis=0))
        cores = [_product(_product(left.T, x), right.T) for x in deltas]
        if self.method == "ties":
            size = jnp.count_nonzero(across) * jnp.count_nonzero(down)
            merged = _ties(cores, self.weight, self.density, size)
        else:
            w = jnp.broadcast_to(jnp.asarray(self.weight, cores[0].dtype), (len(cores),))
            scaled: list[Matrix] = [one * core for one, core in zip(w, cores, strict=True)]
            total = sum(scaled[1:], scaled[0])
            merged = _tsv(scaled) if self.method == "tsv_m" else _isotropic(total)
        return _product(_product(left, merged), right)


def _tsv(cores: list[Matrix]) -> Matrix:
    merged = leading_directions(cores, resolved_svd)
    return sum(cores[1:], cores[0]) / len(cores) if merged is None else merged


def _isotropic(core: Matrix) -> Matrix:
    singular = resolved_svd(core).singular
    mean = jnp.sum(singular) / jnp.maximum(jnp.count_nonzero(singular), 1).astype(core.dtype)
    return mean * polar_factor(core)


@operator(
    base="required",
    reference="Stoica et al., 'Merging with SVD to tie the knots', arXiv 2410.19735",
    helps="LoRA fine-tunes, whose task vectors hardly align as they stand.",
)
def knots(weight: Annotated[Any, PerModel()] = 1.0, density: Density = 1.0, lambda_: float = 1.0) -> Merge:
    """KnOTS: TIES on the coordinates of the task vectors in the column space that all of them span.

    `B + lambda U ties(U^T x_i)` with `[x_1 ... x_T] = U S V^T`. Entries of low-rank updates do not mean the
    same in two models, coordinates in a common basis do: meant for LoRA adapters. Trims matrix by matrix.
    """
    return Merge((), SharedColumns(weight=weights(weight), density=weights(density)), weights(lambda_))


@operator(
    base="required",
    reference="Panariello et al., 'Core space merging', arXiv 2509.17786",
    helps="LoRA fine-tunes of low rank: merged in the space that they span, exactly and cheaply.",
)
def core_space(
    weight: Annotated[Any, PerModel()] = 1.0,
    density: Density = 1.0,
    method: Method = "ties",
    lambda_: float = 1.0,
) -> Merge:
    """Core space: a merge of the small cores that low-rank task vectors have in two common bases.

    `B + lambda U merge(U^T x_i V) V^T`; the result has at most the rank of all updates together. Meant for
    LoRA adapters; `method="tsv_m"` or `iso_c` is the paper's best.
    """
    reduce = CoreSpace(weight=weights(weight), density=weights(density), method=method)
    return Merge((), reduce, weights(lambda_))
