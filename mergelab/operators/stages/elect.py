"""Elect one sign per entry and silence the models that disagree with it."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from mergelab.operators.algebra import Arrays, Known, Stage, algebraic
from mergelab.operators.arithmetic import add_scaled, coefficient
from mergelab.operators.measures import Measure, Sum
from mergelab.operators.region import Region

__all__ = ["Ballot", "ElectSign", "Tie", "agree"]

Ballot = Literal["sum", "count"]
Tie = Literal["positive", "majority", "skip"]


def agree(x: jax.Array, majority: jax.Array) -> jax.Array:
    """Bool: entries that are non-zero and have the elected sign."""
    return (x != 0) & (jnp.sign(x) == majority)


@algebraic
class ElectSign(Stage):
    """Zeroes every entry whose sign differs from the elected one.

    Each model votes with `weight * x`: `ballot="sum"` lets magnitudes vote (the paper's rule), `count`
    only signs. A zero sum elects `+` (`tie="positive"`, mergekit), the sign that prevails over the whole
    tree (`majority`, the TIES authors' code), or nobody (`skip`).

    Reference: Yadav et al., "TIES-Merging", arXiv 2306.01708.
    """

    weight: Any = 1.0
    ballot: Ballot = dataclasses.field(default="sum", metadata={"static": True})
    tie: Tie = dataclasses.field(default="positive", metadata={"static": True})

    per_model: ClassVar[tuple[str, ...]] = ("weight",)

    def measures(self) -> tuple[Measure, ...]:
        return (Sum(ElectSign.tally, scope="tree"),) if self.tie == "majority" else ()

    def tally(self, xs: Arrays, base: Any, region: Region, known: Known) -> jax.Array:
        """Elected signs, summed over all entries."""
        return region.total(jnp.sign(self._votes(xs)))

    def _votes(self, xs: Arrays) -> jax.Array:
        total = None
        for i, x in enumerate(xs):
            x = jax.lax.stop_gradient(x)
            if self.ballot == "sum":
                total = add_scaled(total, coefficient(self.weight, i), x)
            else:
                vote = jnp.sign(coefficient(self.weight, i) * x)
                total = vote if total is None else total + vote
        assert total is not None
        return total

    def apply(self, xs: Arrays, base: jax.Array | None, region: Region, known: Known) -> Arrays:
        votes = self._votes(xs)
        one = jnp.float32(1)
        elected = jnp.sign(votes)
        if self.tie == "positive":
            elected = jnp.where(votes >= 0, one, -one)
        elif self.tie == "majority":
            elected = jnp.where(votes == 0, jnp.sign(known[0]).astype(jnp.float32), elected)
        return tuple(
            jnp.where(
                agree(jax.lax.stop_gradient(coefficient(self.weight, i) * x), elected), x, jnp.float32(0)
            )
            for i, x in enumerate(xs)
        )
