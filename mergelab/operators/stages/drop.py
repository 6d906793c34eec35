"""Drop entries of each task vector at random: uniformly (DARE), or by magnitude rank (DELLA's MAGPRUNE)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mergelab.operators.algebra import Arrays, Granularity, Known, Stage, algebraic
from mergelab.operators.measures import Measure, PerBlock, RowOrder
from mergelab.operators.randomness import uniform
from mergelab.operators.region import Region
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
        return _packed(
            [
                uniform(region.random_bits(_DARE, i)) < _float32(of_model(self.density, i))
                for i in range(len(xs))
            ]
        )

    def apply(self, xs: Arrays, base: jax.Array | None, region: Region, known: Known) -> Arrays:
        return tuple(
            jnp.where(_unpacked(known[0], i), self._rescaled(x, i), jnp.float32(0)) for i, x in enumerate(xs)
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
    kept with probability `density`. At density 1 or above nothing is dropped, at 0 or below everything.

    Reference: Deep et al., "DELLA-Merging", arXiv 2406.11617.
    """

    density: Any
    epsilon: Any = 0.15

    granularity: ClassVar[Granularity] = "row"
    per_model: ClassVar[tuple[str, ...]] = ("density", "epsilon")

    def measures(self) -> tuple[Measure, ...]:
        return RowOrder(MagPrune.keys), PerBlock(MagPrune.draw)

    def keys(self, xs: Arrays, base: Any, region: Region, known: Known) -> tuple[jax.Array, ...]:
        """Magnitude keys, whose order within each row is wanted."""
        return tuple(magnitude_key(jax.lax.stop_gradient(x)) for x in xs)

    def draw(self, xs: Arrays, base: Any, region: Region, known: Known) -> tuple[jax.Array, ...]:
        """Which entries are kept, packed by model."""
        return _packed(
            [
                uniform(region.random_bits(_DELLA, i)) < self._probability(order, i)
                for i, order in enumerate(known[0])
            ]
        )

    def _probability(self, order: jax.Array, model: int) -> jax.Array:
        density, epsilon = _float32(of_model(self.density, model)), _float32(of_model(self.epsilon, model))
        columns = order.shape[-1]
        height = 1 - order.astype(jnp.float32) / jnp.float32(max(columns - 1, 1))
        centred = jnp.float32(0.5) if columns == 1 else height
        probability = density + epsilon * (2 * centred - 1)
        certain = jnp.where(density >= 1, jnp.float32(1), jnp.float32(0))
        return jnp.where((density >= 1) | (density <= 0), certain, probability)

    def apply(self, xs: Arrays, base: jax.Array | None, region: Region, known: Known) -> Arrays:
        return tuple(jnp.where(_unpacked(known[1], i), x, jnp.float32(0)) for i, x in enumerate(xs))


def _packed(masks: list[jax.Array]) -> tuple[jax.Array, ...]:
    """Bool masks as bits of uint8 arrays, eight models to an array."""
    packed = []
    for first in range(0, len(masks), 8):
        word = jnp.zeros_like(masks[first], dtype=jnp.uint8)
        for bit, mask in enumerate(masks[first : first + 8]):
            word = word | (mask.astype(jnp.uint8) << jnp.uint8(bit))
        packed.append(word)
    return tuple(packed)


def _unpacked(packed: tuple[jax.Array, ...], model: int) -> jax.Array:
    """The bool mask of one model."""
    return (packed[model // 8] >> jnp.uint8(model % 8)) & jnp.uint8(1) == jnp.uint8(1)
