"""`ram` and `ramplus_tl`: keep what only one model changed, average what several did."""

from __future__ import annotations

from typing import Annotated, Any

import jax
import jax.numpy as jnp

from mergelab.operators.algebra import Arrays, Known, Reduction, algebraic
from mergelab.operators.arithmetic import coefficient, rounded
from mergelab.operators.compose import Merge
from mergelab.operators.declare import Range, exact, operator, weights
from mergelab.operators.measures import Measure, Sum
from mergelab.operators.region import Region

__all__ = ["Overlap", "OverlapPlus", "ram", "ramplus_tl"]

Epsilon = Annotated[float, Range(0.0)]


def _changed(xs: Arrays, epsilon: Any) -> tuple[Arrays, jax.Array]:
    """Which entries each model changed by more than epsilon, and how many models did."""
    changed = tuple(jnp.abs(x) > coefficient(epsilon) for x in xs)
    count = sum((c.astype(jnp.float32) for c in changed[1:]), changed[0].astype(jnp.float32))
    return changed, count


def _averaged(xs: Arrays, changed: Arrays, count: jax.Array, gains: list[Any]) -> jax.Array:
    total = jnp.zeros_like(xs[0])
    for x, c, gain in zip(xs, changed, gains, strict=True):
        # Divided before they are added, not after: the two round differently, and this is mergekit's order.
        share = jnp.where(count == 1, rounded(x * gain), x / jnp.maximum(count, jnp.float32(1)))
        total = total + jnp.where(c, share, jnp.float32(0))
    return total


@algebraic
class Overlap(Reduction):
    """The mean over the models that changed an entry by more than `epsilon`; zero where none did."""

    epsilon: Any = 1e-5

    def apply(self, xs: Arrays, base: jax.Array | None, region: Region, known: Known) -> jax.Array:
        changed, count = _changed(xs, self.epsilon)
        return _averaged(xs, changed, count, [jnp.float32(1)] * len(xs))


@algebraic
class OverlapPlus(Reduction):
    """`Overlap`, with each model's unique entries multiplied by `1 + r clip(shared / unique, 0, alpha)`.

    `shared` and `unique` count the model's changed entries that other models changed too, or did not.
    """

    r: Any = 0.1
    alpha: Any = 0.2
    epsilon: Any = 1e-5

    def measures(self) -> tuple[Measure, ...]:
        return (Sum(OverlapPlus.counts, OverlapPlus.gains),)

    def counts(
        self, xs: Arrays, base: Any, region: Region, known: Known
    ) -> list[tuple[jax.Array, jax.Array]]:
        """Counts, for each model, of shared and unique changed entries."""
        changed, count = _changed(tuple(jax.lax.stop_gradient(x) for x in xs), self.epsilon)
        return [(region.total(c & (count > 1)), region.total(c & (count == 1))) for c in changed]

    def gains(self, totals: list[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, ...]:
        """The factor on each model's unique entries."""

        def gain(shared: jax.Array, unique: jax.Array) -> jax.Array:
            dtype = shared.dtype
            ratio = shared / jnp.maximum(unique, jnp.asarray(self.epsilon, dtype))
            return (
                1 + jnp.asarray(self.r, dtype) * jnp.clip(ratio, 0, jnp.asarray(self.alpha, dtype))
            ).astype(jnp.float32)

        return tuple(gain(shared, unique) for shared, unique in totals)

    def apply(self, xs: Arrays, base: jax.Array | None, region: Region, known: Known) -> jax.Array:
        changed, count = _changed(xs, self.epsilon)
        return _averaged(xs, changed, count, list(known[0]))


@operator(
    base="required",
    min_models=0,
    reference="RAM, arXiv 2601.13572",
    helps="Models trained by reinforcement learning, whose changes are sparse and seldom overlap.",
)
def ram(epsilon: Epsilon = 1e-5) -> Merge:
    """Reinforced agent merging: unique changes are kept whole, overlapping ones averaged."""
    return Merge((), Overlap(weights(epsilon)))


@operator(
    base="required",
    min_models=0,
    reference="RAM+, arXiv 2601.13572",
    helps="The same as ram where much of the changes is shared, so that unique ones would be drowned.",
)
def ramplus_tl(r: float = 0.1, alpha: Annotated[float, Range(0.0)] = 0.2, epsilon: Epsilon = 1e-5) -> Merge:
    """RAM with unique changes amplified by how much of the model's change is shared, per tensor."""
    return Merge((), OverlapPlus(exact(r), exact(alpha), weights(epsilon)))
