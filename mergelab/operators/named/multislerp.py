"""`multislerp`: a weighted point on the sphere spanned by any number of models."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp

from mergelab.errors import OperatorError
from mergelab.operators.algebra import Arrays, Known, algebraic
from mergelab.operators.compose import Merge
from mergelab.operators.declare import PerModel, Range, operator
from mergelab.operators.hyper import total_weight, weights
from mergelab.operators.reductions.gram import GramReduction, resolution, safe_sqrt
from mergelab.operators.region import Region

__all__ = ["MultiSlerp", "multislerp"]


@algebraic
class MultiSlerp(GramReduction):
    """One tangent step on the unit sphere, at the weighted mean direction, rescaled by the mean norm.

    `u_i = x_i / (|x_i| + eps)`, `m = sum w_i u_i`; `T = sum w_i (u_i - (u_i . m) m)` for `m` normalised, and
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


@operator(base="optional", reference="mergekit 0.1.5, method multislerp")
def multislerp(
    weight: Annotated[Any, PerModel()],
    normalize_weights: bool = True,
    eps: Annotated[float, Range(0.0, 1.0)] = 1e-8,
) -> Merge:
    """Weighted barycentre on the sphere, in one tangent step; with a base, of the differences from it.

    Raises:
        OperatorError: `normalize_weights` and the weights sum to zero; or, when run, the weighted directions
            of three or more models cancel.
    """
    if normalize_weights and total_weight(weight) == 0:
        raise OperatorError(
            "multislerp: the weights sum to 0, so they cannot be normalised; change a weight or set "
            "`normalize_weights: false`."
        )
    return Merge((), MultiSlerp(weights(weight), eps, normalize_weights))
