"""`karcher`: the Riemannian (Karcher) mean of the models' directions."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from mergelab.operators.algebra import algebraic
from mergelab.operators.compose import Merge
from mergelab.operators.declare import Range, operator
from mergelab.operators.reductions.gram import GramReduction, resolution, safe_arccos, safe_sqrt

__all__ = ["Karcher", "karcher"]


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


@operator(base="as_input", reference="mergekit 0.1.5, method karcher")
def karcher(max_iter: Annotated[int, Range(0)] = 10, tol: Annotated[float, Range(0.0)] = 1e-5) -> Merge:
    """The Karcher mean: the point of the sphere with the least mean squared angle to all models."""
    return Merge((), Karcher(max_iter, tol), deltas=False)
