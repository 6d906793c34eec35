"""Drop entries of each task vector at random: uniformly (DARE), or by magnitude rank (DELLA's MAGPRUNE)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mergelab.operators.algebra import Arrays, Granularity, Known, Stage, algebraic
from mergelab.operators.masks import pack_masks, unpack_mask
from mergelab.operators.measures import Measure, PerBlock, RowOrder
from mergelab.operators.randomness import uniform
from mergelab.operators.region import Region
from mergelab.operators.row_order import RowQuestion
from mergelab.operators.selection import magnitude_key
from mergelab.operators.stages.trim import of_model

__all__ = ["Drop", "MagPrune"]

_DARE, _DELLA = 1, 2


def _float32(value: Any) -> jax.Array:
    return jnp.asarray(value, jnp.float32)


@algebraic
class Drop(Stage):
    """Keeps each entry with probability `density`, independently, and zeroes the others.

    `rescale` divides what is kept by `density`, so that the expected value is unchanged (the paper's form;
    mergekit instead matches the L1 norm, see `RescaleL1`).

    Reference: Yu et al., "Language Models are Super Mario" (DARE), arXiv 2311.03099.
    """

    density: Any
    rescale: bool = dataclasses.field(default=True, metadata={"static": True})

    per_model: ClassVar[tuple[str, ...]] = ("density",)

    def measures(self) -> tuple[Measure, ...]:
        return (PerBlock(Drop.draw),)

    def draw(self, xs: Arrays, base: Any, region: Region, known: Known) -> tuple[jax.Array, ...]:
        """Which entries are kept, packed by model."""
        return pack_masks(
            [
                uniform(region.random_bits(_DARE, i)) < _float32(of_model(self.density, i))
                for i in range(len(xs))
            ]
        )

    def apply(self, xs: Arrays, base: jax.Array | None, region: Region, known: Known) -> Arrays:
        return tuple(
            jnp.where(unpack_mask(known[0], i), self._rescaled(x, i), jnp.float32(0))
            for i, x in enumerate(xs)
        )

    def _rescaled(self, x: jax.Array, model: int) -> jax.Array:
        if not self.rescale:
            return x
        density = _float32(of_model(self.density, model))
        return x / jnp.where((density > 0) & (density < 1), density, jnp.float32(1))


@algebraic
class MagPrune(Stage):
    """Keeps each entry with a probability that grows with its magnitude's rank within its row.

    The smallest entry of a row is kept with probability `density - epsilon`, the largest with
    `density + epsilon`, linearly between; rows are taken along the last axis, and a row of one entry is
    kept with probability `density`. Equal magnitudes share the mean probability of the ranks they take up, so
    nothing depends on their order. At density 1 or above nothing is dropped, at 0 or below everything.

    Reference: Deep et al., "DELLA-Merging", arXiv 2406.11617.
    """

    density: Any
    epsilon: Any = 0.15

    granularity: ClassVar[Granularity] = "row"
    per_model: ClassVar[tuple[str, ...]] = ("density", "epsilon")

    def measures(self) -> tuple[Measure, ...]:
        return (RowOrder(MagPrune.ask),)

    def ask(self, xs: Arrays, base: Any, region: Region, known: Known) -> tuple[RowQuestion, ...]:
        """Whether each entry is kept, as a comparison of magnitudes that its random number chooses."""
        return tuple(self._ask(magnitude_key(jax.lax.stop_gradient(x)), region, i) for i, x in enumerate(xs))

    def _ask(self, keys: jax.Array, region: Region, model: int) -> RowQuestion:
        """The comparison that decides each entry of one model.

        `reach` is the number of ranks whose probability exceeds the entry's random number. An entry is kept
        if fewer others than that are larger, which is to say: if it is not below the key at that rank. Half
        of the entries, by a bit of the random number, count their equals as larger too: they must be above
        the next key. Without equals both come to the same.
        """
        density, epsilon = (
            _float32(of_model(jax.lax.stop_gradient(value), model)) for value in (self.density, self.epsilon)
        )
        bits, columns = region.random_bits(_DELLA, model), keys.shape[-1]
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
        return tuple(jnp.where(unpack_mask(known[0], i), x, jnp.float32(0)) for i, x in enumerate(xs))
