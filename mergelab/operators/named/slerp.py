"""`slerp`: the arc from the base to one other model."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mergelab.operators.algebra import algebraic
from mergelab.operators.compose import Merge
from mergelab.operators.declare import operator
from mergelab.operators.hyper import weights
from mergelab.operators.reductions.gram import GramReduction, safe_arccos, safe_sqrt

__all__ = ["Slerp", "slerp"]


@algebraic
class Slerp(GramReduction):
    """`sin((1-t) theta) / sin theta * A + sin(t theta) / sin theta * B`, A the base, on unnormalised vectors.

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
    base="required", max_models=1, reference="Shoemake, 'Animating rotation with quaternion curves', 1985"
)
def slerp(t: float) -> Merge:
    """Spherical interpolation from the base (`t` = 0) to the other model (`t` = 1), tensor by tensor.

    The norm is preserved only where both norms are equal; `t` outside [0, 1] extrapolates along the arc.
    """
    return Merge((), Slerp(weights(t)), deltas=False)
