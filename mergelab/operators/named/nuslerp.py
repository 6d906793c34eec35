"""`nuslerp`: spherical interpolation of two models, or of two task vectors, whole or row by row."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from mergelab.operators.algebra import Arrays, Granularity, Known, Merge, Reduction, algebraic
from mergelab.operators.arithmetic import coefficient, rounded, row_sum
from mergelab.operators.declare import PerModel, operator
from mergelab.operators.hyper import weights
from mergelab.operators.measures import Measure, Sum
from mergelab.operators.reductions.gram import safe_arccos, safe_sqrt
from mergelab.operators.region import Region

__all__ = ["NuSlerp", "nuslerp"]

Along = Literal["all", "row", "column"]


@algebraic
class NuSlerp(Reduction):
    """Slerp at `t = w1 / (w0 + w1)` (.5 where `|w0 + w1| < 1e-6`) on unnormalised vectors.

    Vectors are whole tensors (`along="all"`), rows along the last axis (`row`), or the lines along the
    first axis (`column`). Colinear ones (`1 - cos^2 <= 1e-16`) are interpolated linearly.
    """

    weight: Any
    along: Along = dataclasses.field(default="all", metadata={"static": True})

    per_model: ClassVar[tuple[str, ...]] = ("weight",)

    @property
    def grain(self) -> Granularity:
        return "element" if self.along == "all" else self.along

    def measures(self) -> tuple[Measure, ...]:
        return () if self.along == "row" else (Sum(NuSlerp.products, NuSlerp.coefficients),)

    def products(self, xs: Arrays, base: Any, region: Region, known: Known) -> tuple[jax.Array, ...]:
        """`<a,a>, <b,b>, <a,b>`, over everything or over the first axis."""
        a, b = xs
        pairs = (a * a, b * b, a * b)
        if self.along == "all":
            return tuple(region.total(p) for p in pairs)
        return tuple(jnp.sum(p.astype(region.wide), axis=0) for p in pairs)

    def coefficients(self, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        """The factors of both vectors."""
        aa, bb, ab = totals
        w0, w1 = (coefficient(self.weight, i).astype(aa.dtype) for i in range(2))
        total = w0 + w1
        degenerate = jnp.abs(total) < 1e-6
        t = jnp.where(degenerate, 0.5, w1 / jnp.where(degenerate, 1, total))
        cosine = ab / (jnp.maximum(safe_sqrt(aa), 1e-7) * jnp.maximum(safe_sqrt(bb), 1e-7))
        cosine = jnp.clip(cosine, -1, 1)
        sine_squared = 1 - cosine * cosine
        colinear = sine_squared <= (1e-16 if aa.dtype == jnp.float64 else 1e-7)
        theta = safe_arccos(jnp.where(colinear, 0, cosine))
        first = jnp.where(colinear, 1 - t, jnp.sin((1 - t) * theta) / jnp.sin(theta))
        second = jnp.where(colinear, t, jnp.sin(t * theta) / jnp.sin(theta))
        return first.astype(jnp.float32), second.astype(jnp.float32)

    def apply(self, xs: Arrays, base: jax.Array | None, region: Region, known: Known) -> jax.Array:
        a, b = xs
        if self.along == "row":
            products = tuple(row_sum(rounded(p)) for p in (a * a, b * b, a * b))
            first, second = self.coefficients(products)
        else:
            first, second = known[0]
        if self.along == "column" and a.ndim > 1:
            first, second = (jnp.broadcast_to(c, a.shape) for c in (first[None], second[None]))
        return rounded(first * a) + rounded(second * b)


@operator(base="optional", min_models=2, max_models=2, reference="mergekit 0.1.5, method nuslerp")
def nuslerp(
    weight: Annotated[Any, PerModel()], nuslerp_row_wise: bool = False, nuslerp_flatten: bool = True
) -> Merge:
    """Spherical interpolation of two models by weight; with a base, of their differences from it.

    `nuslerp_flatten: false` interpolates along the last axis instead of the whole tensor, and
    `nuslerp_row_wise: true` then along the first.
    """
    along: Along = "all" if nuslerp_flatten else "column" if nuslerp_row_wise else "row"
    return Merge((), NuSlerp(weights(weight), along))
