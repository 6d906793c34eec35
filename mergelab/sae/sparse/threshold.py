"""The k-th largest of many non-negative numbers, exactly, from counts alone.

The bits of a non-negative float, read as an integer, are in the order of the floats, so the k-th largest is
found bit by bit: 31 counts, whatever the shape. Counts add over devices, so nothing is gathered.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

__all__ = ["kth_largest"]


def kth_largest(x: Array, k: int | Array, count: Callable[[Array], Array]) -> Array:
    """The k-th largest element of each of the sets that `count` sums over.

    Args:
        x: non-negative, float32.
        k: rank, from 1; broadcasts against the counts.
        count: sums flags over a set, keeping its dimensions so that the result broadcasts against `x`; int32.

    Returns:
        The values, of the counts' shape; 0 for a set with fewer than k elements.
    """
    bits = lax.bitcast_convert_type(lax.stop_gradient(x), jnp.int32)
    start = jnp.zeros_like(count(bits > 0))

    def decide(step: Array, found: Array) -> Array:
        higher = found | (jnp.int32(1) << (30 - step))
        return jnp.where(count(bits >= higher) >= k, higher, found)

    found = lax.fori_loop(0, 31, decide, start)
    return lax.bitcast_convert_type(found, jnp.float32)
