"""Which keys a query sees: real, not in the future, and within a sliding window."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

__all__ = ["visible_keys"]


def visible_keys(
    queries: Int[Array, " query"],
    keys: int,
    real: Bool[Array, "batch key"] | None,
    causal: bool = True,
    window: int | None = None,
) -> Bool[Array, "rows query key"]:
    """True where a query may look at a key.

    Args:
        queries: the slot of each query.
        keys: number of key slots, from 0.
        real: False for padding; None if there is none (then `rows` is 1, else it is the batch).
        causal: whether a query sees only its own slot and earlier ones.
        window: if given, a query sees only the last `window` slots, its own among them.
    """
    distance = queries[:, None] - jnp.arange(keys, dtype=queries.dtype)[None]
    seen = distance >= 0 if causal else jnp.ones(distance.shape, jnp.bool_)
    if window is not None:
        seen &= distance < window
    seen = seen[None]
    return seen if real is None else seen & real[:, None]
