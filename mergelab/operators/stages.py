"""Stages: maps of all models' deltas that keep their number (trim, drop, elect signs, rescale)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
from jax.core import Tracer

from mergelab.operators.algebra import Arrays, Granularity, Known, Stage, algebraic
from mergelab.operators.arithmetic import add_scaled, coefficient, rounded
from mergelab.operators.measures import (
    Measure,
    MeasureScope,
    PerBlock,
    Rank,
    RowOrder,
    Sum,
    of_inner,
    pack_masks,
    unpack_mask,
)
from mergelab.operators.order_statistics import RowQuestion, kept_count, magnitude_key, selected
from mergelab.operators.region import Region, TensorInfo, uniform

__all__ = [
    "Ballot",
    "Drop",
    "ElectSign",
    "MagPrune",
    "MaskTails",
    "RescaleL1",
    "Tie",
    "Trim",
    "agree",
    "of_model",
]


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
    scope: MeasureScope = dataclasses.field(default="tensor", metadata={"static": True})

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
        """Counts for each model: entries that remain above the lower tail, and outliers among them."""
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


_DARE, _DELLA = 1, 2


def _float32(value: Any) -> jax.Array:
    return jnp.asarray(value, jnp.float32)


def _salt(stage: int, draw: int) -> int:
    """The salt of a stage's n-th draw; the first is the stage's alone."""
    return stage + (draw << 8)


def _kept(x: jax.Array, masks: tuple[jax.Array, ...], model: int, models: int, draws: int) -> jax.Array:
    """`x` times the fraction of the model's masks that keep an entry."""
    if draws == 1:
        return jnp.where(unpack_mask(masks, model), x, jnp.float32(0))
    count = sum(unpack_mask(masks, draw * models + model).astype(jnp.float32) for draw in range(draws))
    return jnp.where(count > 0, rounded(x * count) / jax.lax.optimization_barrier(jnp.float32(draws)), 0)


@algebraic
class Drop(Stage):
    """Keeps each entry with probability `density`, independently, and zeroes the others.

    `rescale` divides what is kept by `density`, so that the expected value is unchanged (the paper's form;
    mergekit instead matches the L1 norm, see `RescaleL1`), or by `q`, if there is one (DAREx). With
    `draws` an entry is multiplied by the fraction of so many masks that keep it.

    Reference: Yu et al., "Language Models are Super Mario" (DARE), arXiv 2311.03099.
    """

    density: Any
    rescale: bool = dataclasses.field(default=True, metadata={"static": True})
    q: Any = None
    draws: int = dataclasses.field(default=1, metadata={"static": True})

    per_model: ClassVar[tuple[str, ...]] = ("density", "q")

    def measures(self) -> tuple[Measure, ...]:
        return (PerBlock(Drop.draw),)

    def draw(self, xs: Arrays, base: Any, region: Region, known: Known) -> tuple[jax.Array, ...]:
        """Which entries are kept, packed by draw and model."""
        return pack_masks(
            [
                uniform(region.random_bits(_salt(_DARE, draw), i)) < _float32(of_model(self.density, i))
                for draw in range(self.draws)
                for i in range(len(xs))
            ]
        )

    def apply(self, xs: Arrays, base: jax.Array | None, region: Region, known: Known) -> Arrays:
        return tuple(_kept(self._rescaled(x, i), known[0], i, len(xs), self.draws) for i, x in enumerate(xs))

    def _rescaled(self, x: jax.Array, model: int) -> jax.Array:
        if not self.rescale:
            return x
        if self.q is not None:
            # Compilers multiply by the reciprocal of what they know to be constant, which rounds otherwise.
            return x / jax.lax.optimization_barrier(_float32(of_model(self.q, model)))
        density = jax.lax.optimization_barrier(_float32(of_model(self.density, model)))
        return x / jnp.where((density > 0) & (density < 1), density, jnp.float32(1))


@algebraic
class MagPrune(Stage):
    """Keeps each entry with a probability that grows with its magnitude's rank within its row.

    The smallest entry of a row is kept with probability `density - epsilon`, the largest with
    `density + epsilon`, linearly between; rows are taken along the last axis, and a row of one entry is
    kept with probability `density`. Equal magnitudes share the mean probability of the ranks they take up, so
    nothing depends on their order. At density 1 or above nothing is dropped, at 0 or below everything. With
    `draws` an entry is multiplied by the fraction of so many masks that keep it.

    Reference: Deep et al., "DELLA-Merging", arXiv 2406.11617.
    """

    density: Any
    epsilon: Any = 0.15
    draws: int = dataclasses.field(default=1, metadata={"static": True})

    granularity: ClassVar[Granularity] = "row"
    per_model: ClassVar[tuple[str, ...]] = ("density", "epsilon")

    def measures(self) -> tuple[Measure, ...]:
        return (RowOrder(MagPrune.ask),)

    def ask(self, xs: Arrays, base: Any, region: Region, known: Known) -> tuple[RowQuestion, ...]:
        """Whether each entry is kept, as a comparison of magnitudes that its random number chooses."""
        keys = [magnitude_key(jax.lax.stop_gradient(x)) for x in xs]
        drawn = [region.random_bits_of_all(_salt(_DELLA, draw), len(xs)) for draw in range(self.draws)]
        return tuple(self._ask(keys[i], bits, i) for each in drawn for i, bits in enumerate(each))

    def _ask(self, keys: jax.Array, bits: jax.Array, model: int) -> RowQuestion:
        """The comparison that decides each entry of one model in one draw.

        `reach` is the number of ranks whose probability exceeds the entry's random number. An entry is kept
        if fewer others than that are larger, which is to say: if it is not below the key at that rank. Half
        of the entries, by a bit of the random number, count their equals as larger too: they must be above
        the next key. Without equals both come to the same.
        """
        density, epsilon = (
            _float32(of_model(jax.lax.stop_gradient(value), model)) for value in (self.density, self.epsilon)
        )
        columns = keys.shape[-1]
        margin = density - uniform(bits)
        reach = jnp.where(margin > 0, columns, 0)
        if columns > 1:
            half = jnp.float32((columns - 1) / 2)
            sloped = jnp.ceil(half + margin * (half / jnp.where(epsilon > 0, epsilon, 1)))
            reach = jnp.where(epsilon > 0, jnp.clip(sloped, 0, columns).astype(jnp.int32), reach)
        reach = jnp.where(density >= 1, columns, jnp.where(density <= 0, 0, reach))
        lenient = bits & jnp.uint32(1)
        place = jnp.clip(columns - 1 - reach + lenient.astype(jnp.int32), 0, columns - 1)
        mine = jnp.where(reach == columns, jnp.uint32(0xFFFFFFFF), keys + lenient)
        return RowQuestion(keys, place, jnp.where(reach == 0, jnp.uint32(0), mine))

    def apply(self, xs: Arrays, base: jax.Array | None, region: Region, known: Known) -> Arrays:
        return tuple(_kept(x, known[0], i, len(xs), self.draws) for i, x in enumerate(xs))


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


@algebraic
class RescaleL1(Stage):
    """Applies `inner`, then multiplies each model's tensor so that its L1 norm is what it was before.

    This is what mergekit calls `rescale`; tensors whose norm is below 1e-7 before or after are left alone.
    """

    inner: Stage

    @property
    def grain(self) -> Granularity:
        return self.inner.grain

    def at(self, tensor: TensorInfo) -> Self:
        return dataclasses.replace(self, inner=self.inner.at(tensor))

    def workspace(self, shape: tuple[int, ...], models: int) -> int:
        return self.inner.workspace(shape, models)

    def check_models(self, models: int, operator: str) -> None:
        self.inner.check_models(models, operator)

    def measures(self) -> tuple[Measure, ...]:
        return (*(of_inner(m) for m in self.inner.measures()), Sum(RescaleL1.norms, RescaleL1.ratios))

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
