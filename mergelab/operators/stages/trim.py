"""Keep each task vector's entries by the rank of their magnitude: the largest, or all but both tails."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.core import Tracer

from mergelab.operators.algebra import Arrays, Known, Stage, algebraic
from mergelab.operators.measures import Measure, Rank, Scope
from mergelab.operators.region import Region
from mergelab.operators.selection import kept_count, magnitude_key, selected

__all__ = ["MaskTails", "Trim", "of_model"]


def of_model(values: Any, model: int) -> Any:
    """One model's entry of a hyper-parameter that is a scalar or has one value per model."""
    return values[model] if isinstance(values, tuple | list) or jnp.ndim(values) else values


def _magnitudes(part: Any, xs: Arrays, base: Any, region: Region, known: Known) -> tuple[jax.Array, ...]:
    return tuple(magnitude_key(jax.lax.stop_gradient(x)) for x in xs)


def _is_traced(*values: Any) -> bool:
    return any(isinstance(v, Tracer) for v in values)


@algebraic
class Trim(Stage):
    """Keeps the `max(1, int(density * n))` entries of largest magnitude and zeroes the others.

    `density` is one fraction or one per model; at 1 or above nothing is trimmed, at 0 or below nothing is
    kept. Ties go to the lowest index. `scope="tree"` ranks over all tensors of a model together, as the
    TIES authors' code does; `tensor` ranks within each tensor, as mergekit does.

    Reference: Yadav et al., "TIES-Merging", arXiv 2306.01708.
    """

    density: Any
    scope: Scope = dataclasses.field(default="tensor", metadata={"static": True})

    per_model: ClassVar[tuple[str, ...]] = ("density",)

    def measures(self) -> tuple[Measure, ...]:
        return (Rank(_magnitudes, Trim.kept, self.scope),)

    def kept(self, known: Known, size: int, models: int) -> Sequence[Sequence[Any]]:
        """How many entries each model keeps."""

        def count(density: Any) -> Any:
            nothing = not _is_traced(density) and density <= 0
            return 0 if nothing else kept_count(density, size, at_least=1)

        return [[count(of_model(self.density, i))] for i in range(models)]

    def apply(self, xs: Arrays, base: jax.Array | None, region: Region, known: Known) -> Arrays:
        keys = _magnitudes(self, xs, base, region, known)
        return tuple(
            jnp.where(selected(key, region, top), x, jnp.float32(0))
            for x, key, (top,) in zip(xs, keys, known[0], strict=True)
        )


@algebraic
class MaskTails(Stage):
    """Drops the `int(gamma * n)` largest entries as outliers and keeps the next `int(density * n)`.

    Where the two fractions overlap, the kept ones are the smallest. Ties go to the lowest index, counted
    as larger. At density 1 or above nothing is masked.

    Reference: Davari and Belilovsky, "Model Breadcrumbs", arXiv 2312.06795.
    """

    density: Any
    gamma: Any = 0.01

    per_model: ClassVar[tuple[str, ...]] = ("density", "gamma")

    def measures(self) -> tuple[Measure, ...]:
        return (Rank(_magnitudes, MaskTails.kept),)

    def kept(self, known: Known, size: int, models: int) -> Sequence[Sequence[Any]]:
        """Per model: how many entries remain above the lower tail, and how many of those are outliers."""
        return [self._band(of_model(self.density, i), of_model(self.gamma, i), size) for i in range(models)]

    def _band(self, density: Any, gamma: Any, size: int) -> tuple[Any, Any]:
        if not _is_traced(density) and density >= 1:
            return size, 0
        keep, outliers = kept_count(density, size), kept_count(gamma, size)
        if not _is_traced(keep, outliers):
            above = min(size, keep + outliers)
            return above, above - keep
        above = jnp.minimum(jnp.uint32(size), jnp.asarray(keep + outliers, jnp.uint32))
        return above, above - jnp.asarray(keep, jnp.uint32)

    def apply(self, xs: Arrays, base: jax.Array | None, region: Region, known: Known) -> Arrays:
        keys = _magnitudes(self, xs, base, region, known)
        return tuple(
            jnp.where(selected(key, region, above) & ~selected(key, region, outliers), x, jnp.float32(0))
            for x, key, (above, outliers) in zip(xs, keys, known[0], strict=True)
        )
