"""`pcb`: parameters that compete, within a task and between tasks, weighed by how they fare."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp

from mergelab.operators.algebra import Arrays, Known, Reduction, algebraic
from mergelab.operators.arithmetic import rounded
from mergelab.operators.compose import Merge
from mergelab.operators.declare import Range, exact, operator, weights
from mergelab.operators.measures import Measure, MeasureScope, Rank
from mergelab.operators.order_statistics import kept_count, magnitude_key, ordered_key, ordered_value
from mergelab.operators.region import Region

__all__ = ["CompetitionBalance", "pcb"]

_TAIL = 0.0001
"""The fraction of a task vector's magnitudes at either end that is clipped, in the authors' code."""

_ROUNDING = 1e-6
"""A few float32 roundings of a product of `exp` and `tanh`, relative."""


@algebraic
class CompetitionBalance(Reduction):
    """`sum_i s_i c_i / sum_i s_i` entry by entry, with task vectors c clipped in magnitude at both tails.

    `s_i` is the balance `exp(T n(|c_i|)^2) tanh(x_i sum_j x_j)`, zero up to its `1 - ratio` quantile and
    linear from there to 1 at its largest; `n` maps the magnitudes of one task vector to [0, 1]. Quantiles are
    order statistics of the whole tree, or of each tensor.
    """

    ratio: Any = 0.1
    scope: MeasureScope = dataclasses.field(default="tree", metadata={"static": True})

    def measures(self) -> tuple[Measure, ...]:
        return (
            Rank(CompetitionBalance.magnitudes, CompetitionBalance.tails, self.scope, values=True),
            Rank(CompetitionBalance.balances, CompetitionBalance.top, self.scope, values=True),
        )

    def magnitudes(self, xs: Arrays, base: Any, region: Region, known: Known) -> tuple[jax.Array, ...]:
        """Magnitudes as sortable keys."""
        return tuple(magnitude_key(jax.lax.stop_gradient(x)) for x in xs)

    def tails(self, known: Known, size: int, models: int) -> Sequence[Sequence[int]]:
        """Ranks from the top of the magnitudes at which each task vector is clipped: lowest, highest."""
        low, high = int(size * _TAIL), int(size * (1 - _TAIL) - 1)
        return [[size - low, size - high]] * models

    def balances(self, xs: Arrays, base: Any, region: Region, known: Known) -> tuple[jax.Array, ...]:
        """Balances as sortable keys."""
        return tuple(ordered_key(jax.lax.stop_gradient(b)) for _, b in self._balanced(xs, known))

    def top(self, known: Known, size: int, models: int) -> Sequence[Sequence[Any]]:
        """Ranks from the top of the balances at which the scale is 0 and 1."""
        # As the authors' `sorted[int(size * (1 - ratio))]`.
        dropped = kept_count(1 - self.ratio, size)
        return [[size - dropped, 1]] * models

    def apply(self, xs: Arrays, base: jax.Array | None, region: Region, known: Known) -> jax.Array:
        total, divisor = jnp.zeros_like(xs[0]), jnp.zeros_like(xs[0])
        for (clipped, balance), (low, high) in zip(self._balanced(xs, known), known[1], strict=True):
            bounds = [ordered_value(jnp.asarray(s.threshold, jnp.uint32)) for s in (low, high)]
            scale = _normalized(balance, *bounds)
            # The entry at the quantile itself has scale 0; another program may round its balance otherwise.
            scale = jnp.where(balance > bounds[0] + _ROUNDING * jnp.abs(bounds[0]), scale, jnp.float32(0))
            total = total + rounded(clipped * scale)
            divisor = divisor + scale
        return total / jnp.maximum(divisor, jnp.float32(1e-12))

    def _balanced(self, xs: Arrays, known: Known) -> list[tuple[jax.Array, jax.Array]]:
        """Each task vector clipped, and its balance."""
        everyone = sum(xs[1:], xs[0])
        found = []
        for x, (low, high) in zip(xs, known[0], strict=True):
            bounds = [_magnitude(s.threshold) for s in (low, high)]
            size = jnp.clip(jnp.abs(x), *bounds)
            within = _normalized(size, *bounds)
            strength = jnp.exp(jnp.float32(len(xs)) * rounded(within * within))
            found.append((jnp.sign(x) * size, strength * jnp.tanh(rounded(x * everyone))))
        return found


def _magnitude(key: Any) -> jax.Array:
    return jax.lax.bitcast_convert_type(jnp.asarray(key, jnp.uint32), jnp.float32)


def _normalized(x: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """`x` from [low, high] to [0, 1], clipped; 0 where there is nothing between the two."""
    width = high - low
    return jnp.clip((x - low) / jnp.where(width > 0, width, 1), 0, jnp.where(width > 0, jnp.float32(1), 0))


@operator(
    base="required",
    reference="Du et al., 'Parameter Competition Balancing', arXiv 2410.02396",
    helps="Tasks of different kinds whose entries compete, with a search of its factor on data.",
)
def pcb(
    ratio: Annotated[float, Range(0.0, 1.0)] = 0.1,
    lambda_: float = 1.0,
    scope: Literal["tree", "tensor"] = "tree",
) -> Merge:
    """PCB-Merging: keeps the entries that win the competition within and between tasks, and weighs them.

    `B + lambda sum_i s_i c_i / sum_i s_i`: an entry scores by its magnitude within its task vector and by its
    agreement with the others' sum, and only each task's best `ratio` of all entries count. `scope="tensor"`
    competes within each tensor. Helps where tasks conflict; `lambda` from 1 to 1.5 is usual.
    """
    return Merge((), CompetitionBalance(exact(ratio), scope), weights(lambda_))
