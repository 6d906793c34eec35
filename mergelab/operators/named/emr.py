"""`emr`: one task vector for all tasks, and each task's own from it by a mask and a factor."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from mergelab.errors import OperatorError
from mergelab.operators.algebra import Arrays, Known, Reduction, algebraic
from mergelab.operators.compose import Merge
from mergelab.operators.declare import OneOfModels, operator
from mergelab.operators.measures import Measure, Sum
from mergelab.operators.region import Region

__all__ = ["ElectMaskRescale", "emr"]


@algebraic
class ElectMaskRescale(Reduction):
    """The unified vector `g max_i |x_i|` over the models i whose sign is `g = sign(sum_i x_i)`.

    With a `task` t it is zeroed where `x_t` has another sign than g, and multiplied by
    `sum |x_t| / sum |unified masked|` over the whole tree, so that the mean magnitude is the task's own (the
    paper's formula; the authors' code adds up means of tensors). A sum of zero counts as negative.
    """

    task: int | None = dataclasses.field(default=None, metadata={"static": True})

    def check_models(self, models: int, operator: str) -> None:
        super().check_models(models, operator)
        if self.task is not None and not 0 <= self.task < models:
            raise OperatorError(
                f"{operator}: parameter 'task' is {self.task} for {models} model(s), the base not counted; "
                f"give a position from 0 to {models - 1}."
            )

    def measures(self) -> tuple[Measure, ...]:
        if self.task is None:
            return ()
        return (Sum(ElectMaskRescale.magnitudes, ElectMaskRescale.factor, scope="tree"),)

    def magnitudes(self, xs: Arrays, base: Any, region: Region, known: Known) -> tuple[jax.Array, jax.Array]:
        """Sums of magnitudes of the task's own vector, and of what its mask leaves of the unified one."""
        assert self.task is not None
        return region.total(jnp.abs(xs[self.task])), region.total(jnp.abs(self._masked(xs, self.task)))

    def factor(self, totals: Any) -> jax.Array:
        """The factor on the masked vector."""
        own, masked = totals
        return jnp.where(masked > 0, own / jnp.where(masked > 0, masked, 1), 0).astype(jnp.float32)

    def apply(self, xs: Arrays, base: jax.Array | None, region: Region, known: Known) -> jax.Array:
        if self.task is None:
            return _unified(xs)
        return known[0] * self._masked(xs, self.task)

    def _masked(self, xs: Arrays, task: int) -> jax.Array:
        unified = _unified(xs)
        return jnp.where(xs[task] * _elected(xs) > 0, unified, jnp.float32(0))


def _elected(xs: Arrays) -> jax.Array:
    return jnp.where(sum(xs[1:], xs[0]) > 0, jnp.float32(1), jnp.float32(-1))


def _unified(xs: Arrays) -> jax.Array:
    elected = _elected(xs)
    largest = jnp.zeros_like(xs[0])
    for x in xs:
        largest = jnp.maximum(largest, x * elected)
    return elected * largest


@operator(
    base="required",
    reference="Huang et al., 'EMR-Merging', arXiv 2405.17461",
    helps="Several tasks where the task is known at run time: masks restore each from one model.",
)
def emr(task: Annotated[int | None, OneOfModels()] = None) -> Merge:
    """EMR: the unified model; with `task`, that task's model from the unified one, its mask and its factor.

    `task` is a model's name in a recipe, its position among the models in Python. The unified model alone is
    elected, not scaled, and serves as what all tasks' models are made from: they differ from it by one bit
    per entry and one number.

    Raises:
        OperatorError: `task` is no position of a model.
    """
    return Merge((), ElectMaskRescale(None if task is None else int(task)))
