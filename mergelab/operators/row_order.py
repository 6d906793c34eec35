"""The rank of every element within its row, on devices and on the host."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["row_order", "row_order_on_host"]


def row_order(keys: jax.Array) -> jax.Array:
    """int32 `[*block]`: each element's place in its row: largest key first, then lowest index."""
    order = jnp.argsort(~keys, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1, stable=True).astype(jnp.int32)


def row_order_on_host(keys: np.ndarray) -> np.ndarray:
    """The same for a numpy block `[rows, columns]` of uint32 keys.

    Key and column share one 64-bit word, so a plain vectorised sort replaces two stable argsorts.
    """
    rows, columns = keys.shape
    packed = np.bitwise_or(
        np.left_shift((~keys).astype(np.uint64), np.uint64(32)), np.arange(columns, dtype=np.uint64)
    )
    packed.sort(axis=-1)
    column = packed.view(np.uint32).reshape(rows, columns, 2)[..., 0].astype(np.intp)
    order = np.empty((rows, columns), np.int32)
    column += (np.arange(rows, dtype=np.intp) * columns)[:, None]
    order.reshape(-1)[column.reshape(-1)] = np.tile(np.arange(columns, dtype=np.int32), rows)
    return order
