"""Maps over many rows in pieces of one size: memory is that of a piece, and the function is compiled once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["map_pieces"]


def map_pieces(function: Callable[[Any], Any], rows: Any, size: int) -> Any:
    """`jax.lax.map(function, rows)` with `size` rows side by side, jittable.

    The last piece is filled up with the first row. `jax.lax.map` alone would compile the function a second
    time for a shorter one.

    Args:
        function: from one row of every array to arrays.
        rows: a pytree of arrays `[n, ...]`, n at least 1.
        size: rows computed at a time.
    """
    count = jax.tree.leaves(rows)[0].shape[0]
    size = min(size, count)
    missing = -count % size

    def filled(x: Any) -> Any:
        return jnp.concatenate([x, jnp.broadcast_to(x[:1], (missing, *x.shape[1:]))]) if missing else x

    found = jax.lax.map(function, jax.tree.map(filled, rows), batch_size=size)
    return jax.tree.map(lambda x: x[:count], found)
