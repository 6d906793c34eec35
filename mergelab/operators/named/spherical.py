"""Means on the sphere: SLERP, NuSLERP, multi-model SLERP and the Karcher mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from mergelab.errors import OperatorError
from mergelab.operators.algebra import Arrays, Granularity, Known, Reduction, algebraic
from mergelab.operators.arithmetic import coefficient, rounded, row_sum
from mergelab.operators.compose import Merge
from mergelab.operators.declare import PerModel, Range, operator, total_weight, weights
from mergelab.operators.measures import Measure, Sum
from mergelab.operators.reductions import GramReduction, resolution, safe_arccos, safe_sqrt
from mergelab.operators.region import Region

__all__ = ["Karcher", "MultiSlerp", "NuSlerp", "Slerp", "karcher", "multislerp", "nuslerp", "slerp"]


@algebraic
class Slerp(GramReduction):
    """`sin((1-t) theta) / sin theta * A + sin(t theta) / sin theta * B`, A the base, on unnormalized vectors.

    Where `|cos theta| > .9995` (antiparallel too) it is `(1-t) A + t B`; norms up to 1e-8 count as 1.
    """

    t: Any

    with_base: ClassVar[bool] = True

    def solve(self, gram: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """The coefficients of A and B; nearly parallel and antiparallel vectors are off the arc anyway."""
        t = jnp.asarray(self.t, gram.dtype)
        norms = safe_sqrt(jnp.diagonal(gram))
        norms = jnp.where(norms <= 1e-8, 1, norms)
        cosine = jnp.clip(gram[0, 1] / (norms[0] * norms[1]), -1, 1)
        straight = jnp.abs(cosine) > 0.9995
        theta = safe_arccos(jnp.where(straight, 0, cosine))
        a = jnp.where(straight, 1 - t, jnp.sin((1 - t) * theta) / jnp.sin(theta))
        b = jnp.where(straight, t, jnp.sin(t * theta) / jnp.sin(theta))
        return (a.astype(jnp.float32), b.astype(jnp.float32)), jnp.bool_(False)


@operator(
    base="required",
    max_models=1,
    reference="Shoemake, 'Animating rotation with quaternion curves', 1985",
    lone="copy",
    absent="copy",
    strength="t",
    helps="Two models whose weights have about equal norms and that should meet half way.",
)
def slerp(t: float) -> Merge:
    """Spherical interpolation from the base (`t` = 0) to the other model (`t` = 1), tensor by tensor.

    The norm is preserved only where both norms are equal; `t` outside [0, 1] extrapolates along the arc.
    """
    return Merge((), Slerp(weights(t)), deltas=False)


Along = Literal["all", "row", "column"]


@algebraic
class NuSlerp(Reduction):
    """Slerp at `t = w1 / (w0 + w1)` (.5 where `|w0 + w1| < 1e-6`) on unnormalized vectors.

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


@operator(
    base="optional",
    min_models=2,
    max_models=2,
    reference="mergekit 0.1.5, method nuslerp",
    lone="copy",
    absent="copy",
    shares="always",
    helps="Two models, with weights instead of `t`; with a base, where their task vectors differ in angle.",
)
def nuslerp(
    weight: Annotated[Any, PerModel()], nuslerp_row_wise: bool = False, nuslerp_flatten: bool = True
) -> Merge:
    """Spherical interpolation of two models by weight; with a base, of their differences from it.

    `nuslerp_flatten: false` interpolates along the last axis instead of the whole tensor, and
    `nuslerp_row_wise: true` then along the first.
    """
    along: Along = "all" if nuslerp_flatten else "column" if nuslerp_row_wise else "row"
    return Merge((), NuSlerp(weights(weight), along))


@algebraic
class MultiSlerp(GramReduction):
    """One tangent step on the unit sphere, at the weighted mean direction, rescaled by the mean norm.

    `u_i = x_i / (|x_i| + eps)`, `m = sum w_i u_i`; `T = sum w_i (u_i - (u_i . m) m)` for `m` normalized, and
    the result is `(m cos tau + T sin tau / tau) sum w_i |x_i|` with `tau = |T| + eps`.
    """

    weight: Any
    eps: Any = 1e-8
    normalize: bool = dataclasses.field(default=True, metadata={"static": True})

    per_model: ClassVar[tuple[str, ...]] = ("weight",)

    def solve(self, gram: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """The factors of all models; directions that nearly cancel need exact products."""
        n, dtype = gram.shape[0], gram.dtype
        w = jnp.broadcast_to(jnp.asarray(self.weight, dtype), (n,))
        w = w / jnp.sum(w) if self.normalize else w
        if n == 1:
            return (jnp.ones((), jnp.float32),), jnp.bool_(False)
        eps = jnp.asarray(self.eps, dtype)
        norms = safe_sqrt(jnp.diagonal(gram))
        inverse = 1 / (norms + eps)
        cosines = gram * inverse[:, None] * inverse[None, :]
        length = safe_sqrt(w @ cosines @ w)
        # Below its resolution the mean direction would be amplified rounding noise.
        vanished = length < jnp.maximum(eps, resolution(dtype) * jnp.sum(jnp.abs(w)))
        m = w / jnp.where(vanished, 1, length)
        along = cosines @ m
        tangent = w - jnp.sum(w * along) * m
        tau = safe_sqrt(tangent @ cosines @ tangent) + eps
        direction = m * jnp.cos(tau) + tangent * jnp.sin(tau) / tau
        combined = direction * inverse * jnp.sum(w * norms)
        # Antipodal pairs have no direction between them: two models fall back to their weighted sum.
        fallback = w if n == 2 else jnp.full_like(w, jnp.nan)
        doubtful = length < 0.1 * jnp.sum(jnp.abs(w))
        return tuple(jnp.where(vanished, fallback, combined).astype(jnp.float32)), doubtful

    def apply(self, xs: Arrays, base: jax.Array | None, region: Region, known: Known) -> jax.Array:
        # A lone model is passed through without touching its bits.
        return xs[0] if len(xs) == 1 else super().apply(xs, base, region, known)

    def check(self, known: Known, name: str) -> None:
        """Refuses directions that cancel out."""
        if bool(jnp.any(jnp.isnan(jnp.stack(self.coefficients(known))))):
            raise OperatorError(
                f"multislerp: the weighted directions of tensor {name!r} sum to zero (all-zero or antipodal "
                "tensors), so no point between them is defined; change a weight, or merge this tensor "
                "linearly."
            )


@operator(
    base="optional",
    reference="mergekit 0.1.5, method multislerp",
    helps="Several models where averaging would shrink norms: far apart, or many.",
)
def multislerp(
    weight: Annotated[Any, PerModel()],
    normalize_weights: bool = True,
    eps: Annotated[float, Range(0.0, 1.0)] = 1e-8,
) -> Merge:
    """Weighted barycenter on the sphere, in one tangent step; with a base, of the differences from it.

    Raises:
        OperatorError: `normalize_weights` and the weights sum to zero; or, when run, the weighted directions
            of three or more models cancel.
    """
    if normalize_weights and total_weight(weight) == 0:
        raise OperatorError(
            "multislerp: the weights sum to 0, so they cannot be normalized; change a weight or set "
            "`normalize_weights: false`."
        )
    return Merge((), MultiSlerp(weights(weight), eps, normalize_weights))


@algebraic
class Karcher(GramReduction):
    """Iterates `m <- exp_m(mean of log_m(u_i))` on the unit sphere, times the mean norm.

    The iterate is carried as coefficients of the unit vectors `u_i`. Models of norm up to `tol` have no
    direction but count in the mean norm. A model opposite to the iterate pulls in no direction, so it does
    not pull.
    """

    max_iter: int = dataclasses.field(default=10, metadata={"static": True})
    tol: Any = 1e-5

    def solve(self, gram: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """The factors of all models; those that nearly cancel or oppose need exact products."""
        n, dtype = gram.shape[0], gram.dtype
        tol = jnp.asarray(self.tol, dtype)
        norms = safe_sqrt(jnp.diagonal(gram))
        valid = norms > tol
        inverse = jnp.where(valid, 1 / jnp.where(valid, norms, 1), 0)
        cosines = gram * inverse[:, None] * inverse[None, :]
        alpha = jnp.where(valid, 1, 0).astype(dtype)
        alpha = alpha / jnp.maximum(jnp.sum(alpha), 1)

        def length(c: jax.Array) -> jax.Array:
            return safe_sqrt(c @ cosines @ c)

        first = (jnp.arange(n) == jnp.argmax(valid)).astype(dtype)
        size, least = length(alpha), resolution(dtype)
        vanished = size < jnp.maximum(tol, least)
        start = jnp.where(vanished, first, alpha / jnp.where(vanished, 1, size))

        def step(_: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            m, done, doubtful = state
            dots = jnp.clip(cosines @ m, -1, 1)
            theta = safe_arccos(dots)
            used = valid & (theta >= tol) & (theta <= jnp.pi - least)
            doubtful = doubtful | jnp.any(valid & (dots < -0.99))
            pull = jnp.where(used, alpha * theta / jnp.sin(jnp.where(used, theta, 1)), 0)
            tangent = pull - jnp.sum(pull * dots) * m
            size = length(tangent)
            done = done | (size < tol)
            moved = jnp.cos(size) * m + jnp.sin(size) * tangent / jnp.where(done, 1, size)
            norm = length(moved)
            moved = jnp.where(norm > tol, moved / jnp.where(norm > tol, norm, 1), moved)
            return jnp.where(done, m, moved), done, doubtful

        state = (start, jnp.bool_(False), size < 0.1)
        m, _, doubtful = jax.lax.fori_loop(0, self.max_iter, step, state)
        return tuple((m * inverse * jnp.mean(norms)).astype(jnp.float32)), doubtful & jnp.any(valid)


@operator(
    base="as_input",
    reference="mergekit 0.1.5, method karcher",
    helps="The same as multislerp without a weighting, where its one tangent step is not exact enough.",
)
def karcher(
    max_iter: Annotated[int, Range(0, clips="low")] = 10, tol: Annotated[float, Range(0.0)] = 1e-5
) -> Merge:
    """The Karcher mean: the point of the sphere with the least mean squared angle to all models."""
    return Merge((), Karcher(max_iter, tol), deltas=False)
