"""The geometric median of a sample of activations: where a dictionary's `b_pre` starts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from mergelab.sae.sparse.rows import row_dot

__all__ = ["geometric_median"]


def geometric_median(x: Array, *, tolerance: float = 1e-6, max_iterations: int = 1000) -> Array:
    """The point with the least sum of distances to the rows of `x`, by Weiszfeld's iteration.

    Args:
        x: `[rows, d]`, float32.
        tolerance: stops when a step is shorter than this times the mean distance.
        max_iterations: stops there in any case.

    Returns:
        `[d]`. Unlike the mean it is not pulled by a few huge activations.
    """

    def distances(center: Array) -> Array:
        offset = x - center[None, :]
        return jnp.sqrt(row_dot(offset, offset))

    def better(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        center, _, count = state
        far = distances(center)
        # A row at the very center would have infinite weight: bounded, the iteration can leave it.
        weights = 1 / jnp.maximum(far, 1e-7 * far.mean() + 1e-30)
        new = (weights @ x) / weights.sum()
        return new, jnp.sqrt(((new - center) ** 2).sum()) / (far.mean() + 1e-30), count + 1

    def moving(state: tuple[Array, Array, Array]) -> Array:
        return (state[1] > tolerance) & (state[2] < max_iterations)

    start = (x.mean(axis=0), jnp.full((), jnp.inf, x.dtype), jnp.zeros((), jnp.int32))
    return lax.while_loop(moving, better, start)[0]


geometric_median = jax.jit(geometric_median, static_argnames=("tolerance", "max_iterations"))
