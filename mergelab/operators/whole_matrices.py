"""The base of reductions that act on whole matrices, such as those by singular vectors."""

from __future__ import annotations

import dataclasses
from typing import Self

import jax

from mergelab.operators.algebra import Arrays, Granularity, Known, Reduction, algebraic
from mergelab.operators.low_rank import decomposed_in
from mergelab.operators.reductions import Mean
from mergelab.operators.region import Region, TensorInfo

__all__ = ["MatrixReduction"]


@algebraic
class MatrixReduction(Reduction):
    """A reduction that implements `of_matrices`; tensors that are not matrices are averaged.

    Attributes:
        matrix: whether the tensor at hand is a matrix (noted by `at`).
        turned: whether it is [in, out], as flax and GPT-2 store it, and is transposed for the formula.
    """

    matrix: bool = dataclasses.field(default=True, metadata={"static": True})
    turned: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def grain(self) -> Granularity:
        return "tensor" if self.matrix else "element"

    def at(self, tensor: TensorInfo) -> Self:
        return dataclasses.replace(self, matrix=tensor.role == "matrix", turned=tensor.reads == 0)

    def of_matrices(self, deltas: Arrays) -> jax.Array | None:
        """The merged `[out, in]` of the models' in the wide dtype; None to average instead."""
        raise NotImplementedError

    def of_others(self, xs: Arrays, region: Region) -> jax.Array:
        """The merge of a block of a tensor that is not a matrix: the mean."""
        return Mean().apply(xs, None, region, ())

    def apply(self, xs: Arrays, base: jax.Array | None, region: Region, known: Known) -> jax.Array:
        merged = None
        if self.matrix:
            dtype = decomposed_in(region.wide)
            merged = self.of_matrices(tuple((x.T if self.turned else x).astype(dtype) for x in xs))
            merged = merged.T if merged is not None and self.turned else merged
        return self.of_others(xs, region) if merged is None else merged.astype(xs[0].dtype)
