"""`nuslerp`: spherical interpolation of two models, or of two task vectors, whole or row by row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from mergelab.operators.algebra import Arrays, Granularity, Known, Reduction, algebraic
from mergelab.operators.arithmetic import coefficient, rounded, row_sum
from mergelab.operators.compose import Merge
from mergelab.operators.declare import PerModel, operator
from mergelab.operators.hyper import weights
from mergelab.operators.measures import Measure, Sum
from mergelab.operators.reductions.gram import safe_sqrt
from mergelab.operators.region import Region

__all__ = ["NuSlerp", "nuslerp"]

Along = Literal["all", "row", "column"]


@algebraic
class NuSlerp(Reduction):
    """Slerp at `t = w1 / (w0 + w1)` (.5 where `|w0 + w1| < 1e-6`) on unnormalised vectors.

    Vectors are whole tensors (`along="all"`), rows along the last axis (`row`), or the lines along the
    first axis (`column`). Colinear ones are interpolated linearly: where `sin^2 <= 1e-7`, the smallest that a
    float32 cosine tells from 0. Below it the arc between opposite vectors is that of their rounding errors.
    """

    weight: Any
    along: Along = dataclasses.field(default="all", metadata={"static": True})

    per_model: ClassVar[tuple[str, ...]] = ("weight",)

    @property
    def grain(self) -> Granularity:
        return "element" if self.along == "all" else self.along

    def measures(self) -> tuple[Measure, ...]:
        if self.along == "row":
            return ()
        exact = Sum(NuSlerp.exact_products, NuSlerp.coefficients, needed=lambda _, known: bool(known[0][2]))
        return Sum(NuSlerp.products, NuSlerp.coefficients), exact

    def products(self, xs: Arrays, base: Any, region: Region, known: Known) -> tuple[Any, ...]:
        """`<a,a>, <b,b>, <a,b>`, over everything or over the first axis; in float32 the squared sine, too."""
        a, b = xs
        if self.along == "all":
            products = _products(a, b, lambda x, y: region.total(x * y))
        else:
            products = self.exact_products(xs, base, region, known)
        if region.wide == "float64":
            return (*products[:3], None)
        total = region.total if self.along == "all" else _down
        return (*products[:3], _squared_sine(a, b, products, total))

    def exact_products(self, xs: Arrays, base: Any, region: Region, known: Known) -> tuple[Any, ...]:
        """The same with nothing rounded before it is added up."""
        a, b = xs
        if self.along == "all":
            return _products(a, b, region.dot)
        wide = (a.astype(region.wide), b.astype(region.wide))
        return _products(*wide, lambda x, y: _down(x * y))

    def coefficients(self, totals: tuple[Any, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The factors of both vectors, and whether the vectors are so nearly opposite that rounding shows."""
        aa, bb, ab, squared_sine = totals
        w0, w1 = (coefficient(self.weight, i).astype(aa.dtype) for i in range(2))
        total = w0 + w1
        degenerate = jnp.abs(total) < 1e-6
        t = jnp.where(degenerate, 0.5, w1 / jnp.where(degenerate, 1, total))
        cosine = jnp.clip(_cosine(aa, bb, ab), -1, 1)
        squared_sine = 1 - cosine * cosine if squared_sine is None else squared_sine
        colinear = squared_sine <= 1e-7
        sine = jnp.where(colinear, 1, jnp.sqrt(jnp.where(colinear, 1, squared_sine)))
        theta = jnp.arctan2(sine, jnp.where(colinear, 0, cosine))
        first = jnp.where(colinear, 1 - t, jnp.sin((1 - t) * theta) / sine)
        second = jnp.where(colinear, t, jnp.sin(t * theta) / sine)
        opposite = jnp.any(cosine < -0.99)
        return first.astype(jnp.float32), second.astype(jnp.float32), opposite

    def apply(self, xs: Arrays, base: jax.Array | None, region: Region, known: Known) -> jax.Array:
        a, b = xs
        if self.along == "row":
            products = _products(a, b, lambda x, y: row_sum(rounded(x * y)))
            squared_sine = _squared_sine(a, b, products, lambda x: row_sum(rounded(x)))
            first, second, _ = self.coefficients((*products[:3], squared_sine))
        else:
            rough, exact = known
            first, second, _ = rough if exact is None else exact
        if self.along == "column" and a.ndim > 1:
            first, second = (jnp.broadcast_to(c, a.shape) for c in (first, second))
        return rounded(first * a) + rounded(second * b)


def _down(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=0, keepdims=True)


def _products(a: jax.Array, b: jax.Array, inner: Callable[..., jax.Array]) -> tuple[Any, ...]:
    return inner(a, a), inner(b, b), inner(a, b), None


def _cosine(aa: jax.Array, bb: jax.Array, ab: jax.Array) -> jax.Array:
    return ab / (_length(aa) * _length(bb))


def _length(square: jax.Array) -> jax.Array:
    return jnp.maximum(safe_sqrt(square), 1e-7)


def _squared_sine(
    a: jax.Array, b: jax.Array, products: tuple[Any, ...], total: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """What is left of one unit vector without its part along the other, squared.

    `1 - cos^2` is of no use in float32: at small angles it is the rounding error of the cosine.
    """
    aa, bb, ab, _ = products
    cosine = _cosine(aa, bb, ab)
    rest = rounded(a / _length(aa)) - rounded(cosine * rounded(b / _length(bb)))
    short = jnp.minimum(aa, bb) < 1e-14
    return jnp.where(short, 1 - cosine * cosine, jnp.clip(total(rest * rest), 0, 1))


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
