"""`nearswap`: take the other model where it is nearly the base already."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mergelab.operators.algebra import Arrays, Known, Reduction, algebraic
from mergelab.operators.arithmetic import coefficient, rounded
from mergelab.operators.compose import Merge
from mergelab.operators.declare import operator, weights
from mergelab.operators.region import Region

__all__ = ["NearSwap", "nearswap"]


@algebraic
class NearSwap(Reduction):
    """`w X + (1 - w) B` with `w = clip(t / max(|B - X|, 1e-6), 0, 1)`, entry by entry."""

    t: Any

    def apply(self, xs: Arrays, base: jax.Array | None, region: Region, known: Known) -> jax.Array:
        assert base is not None
        (x,) = xs
        distance = jnp.maximum(jnp.abs(base - x), jnp.float32(1e-6))
        share = jnp.clip(coefficient(self.t) / distance, 0, 1)
        return rounded(share * x) + rounded((1 - share) * base)


@operator(
    base="required",
    max_models=1,
    reference="mergekit 0.1.5, method nearswap",
    helps="A base that should take from another model only what it nearly agrees with.",
)
def nearswap(t: float) -> Merge:
    """Swaps in the other model's entries within `t` of the base's, and fades out beyond."""
    return Merge((), NearSwap(weights(t)), deltas=False)
