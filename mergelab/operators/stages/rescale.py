"""Restore the L1 norm that a sparsifying stage took away."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mergelab.operators.algebra import Arrays, Granularity, Known, Stage, algebraic
from mergelab.operators.measures import Measure, Sum
from mergelab.operators.region import Region

__all__ = ["RescaleL1"]


@algebraic
class RescaleL1(Stage):
    """Applies `inner`, then multiplies each model's tensor so that its L1 norm is what it was before.

    This is what mergekit calls `rescale`; tensors whose norm is below 1e-7 before or after are left alone.
    """

    inner: Stage

    @property
    def grain(self) -> Granularity:
        return self.inner.grain

    def check_models(self, models: int, operator: str) -> None:
        self.inner.check_models(models, operator)

    def measures(self) -> tuple[Measure, ...]:
        return (*(_inward(m) for m in self.inner.measures()), Sum(RescaleL1.norms, RescaleL1.ratios))

    def norms(self, xs: Arrays, base: Any, region: Region, known: Known) -> Any:
        """L1 norms of every model before and after `inner`."""
        after = self.inner.apply(xs, base, region, known)
        return [(region.total(jnp.abs(x)), region.total(jnp.abs(y))) for x, y in zip(xs, after, strict=True)]

    def ratios(self, totals: Any) -> Any:
        """The factors, one per model."""

        def ratio(before: jax.Array, after: jax.Array) -> jax.Array:
            usable = (before >= 1e-7) & (after >= 1e-7)
            return jnp.where(usable, before / jnp.where(usable, after, 1), 1).astype(jnp.float32)

        return tuple(ratio(before, after) for before, after in totals)

    def apply(self, xs: Arrays, base: jax.Array | None, region: Region, known: Known) -> Arrays:
        *inner_known, factors = known
        kept = self.inner.apply(xs, base, region, tuple(inner_known))
        return tuple(x * factor for x, factor in zip(kept, factors, strict=True))


def _inward(measure: Measure) -> Measure:
    """The inner stage's measure as the wrapper declares it: its functions still receive the inner stage."""

    def hide(call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda part, *arguments: call(part.inner, *arguments)

    fields = [f for f in ("of", "finish", "counts", "needed") if getattr(measure, f, None) is not None]
    hidden = {field: hide(getattr(measure, field)) for field in fields}
    return dataclasses.replace(measure, **hidden)
