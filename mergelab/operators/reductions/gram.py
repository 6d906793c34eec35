"""Reductions `sum_i c_i x_i` whose coefficients depend on the models only through their Gram matrix.

Points, norms, angles and tangents on a sphere are all inner products, so no geometry ever touches the big
arrays: one pass accumulates an N x N matrix (in float64 wherever the arrays are concrete), a few scalar
operations give the coefficients, and one more pass applies them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mergelab.operators.algebra import Arrays, Known, Reduction
from mergelab.operators.arithmetic import add_scaled
from mergelab.operators.measures import Measure, Sum
from mergelab.operators.region import Region

__all__ = ["GramReduction", "combine", "safe_arccos", "safe_sqrt"]


def combine(coefficients: Any, xs: Arrays) -> jax.Array:
    """`sum_i c_i x_i`, in model order."""
    total = None
    for c, x in zip(coefficients, xs, strict=True):
        total = add_scaled(total, c, x)
    assert total is not None
    return total


def safe_sqrt(x: jax.Array) -> jax.Array:
    """Square root with derivative 0 at 0, and of negative rounding noise 0."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


def safe_arccos(x: jax.Array) -> jax.Array:
    """Arc cosine of a value clipped to [-1, 1], with derivative 0 at the ends."""
    inside = jnp.abs(x) < 1
    end = jnp.where(x > 0, 0.0, jnp.pi).astype(x.dtype)
    return jnp.where(inside, jnp.arccos(jnp.where(inside, x, 0)), end)


class GramReduction(Reduction):
    """A reduction that implements `coefficients(gram)`; the base, if it takes part, is row 0.

    Subclasses set `with_base` when the base model is itself one of the combined vectors (and the merge does
    not work on deltas).
    """

    with_base = False

    def vectors(self, xs: Arrays, base: jax.Array | None) -> Arrays:
        """The arrays that are combined."""
        return (base, *xs) if self.with_base and base is not None else xs

    def measures(self) -> tuple[Measure, ...]:
        return (Sum(type(self).gram, type(self).coefficients),)

    def gram(self, xs: Arrays, base: Any, region: Region, known: Known) -> jax.Array:
        """Inner products of all pairs, `[models, models]`."""
        vectors = self.vectors(xs, base)
        upper = {
            (i, j): region.total(vectors[i] * vectors[j])
            for i in range(len(vectors))
            for j in range(i, len(vectors))
        }
        return jnp.stack(
            [
                jnp.stack([upper[min(i, j), max(i, j)] for j in range(len(vectors))])
                for i in range(len(vectors))
            ]
        )

    def coefficients(self, gram: jax.Array) -> tuple[jax.Array, ...]:
        """One float32 coefficient per vector."""
        raise NotImplementedError

    def apply(self, xs: Arrays, base: jax.Array | None, region: Region, known: Known) -> jax.Array:
        return combine(known[0], self.vectors(xs, base))
