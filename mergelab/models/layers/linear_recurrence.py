"""Memories that fade and are written at every token, read in chunks of matrix products or token by token.

A head's memory is a matrix `S`, which decays by a number of its own at every token and is written with an
outer product: `S_t = exp(g_t) S_{t-1} + k_t u_t^T`, read as `S_t^T q_t`. Mamba 2 writes `u_t = v_t` (Dao &
Gu, arXiv:2405.21060); the gated delta rule writes what the memory lacks of `v_t`, `u_t = b_t (v_t - exp(g_t)
S_{t-1}^T k_t)` (Yang, Kautz & Hatamizadeh, arXiv:2412.06464).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

__all__ = ["CHUNK", "read_memory"]

CHUNK = 64
"""Tokens of a chunk: within one, all tokens look at each other; the memory passes from one to the next."""


def read_memory(
    query: Float[Array, "batch length groups key"],
    key: Float[Array, "batch length groups key"],
    value: Float[Array, "batch length heads value"],
    decay: Float[Array, "batch length heads"],
    memory: Float[Array, "batch heads key value"],
    real: Bool[Array, "batch length"] | None = None,
    strength: Float[Array, "batch length heads"] | None = None,
) -> tuple[Float[Array, "batch length heads value"], Float[Array, "batch heads key value"]]:
    """What every token reads of its memory once it has written it, and the memory after the last; float32.

    Args:
        query: what reads; consecutive groups of `heads / groups` heads share one.
        key: what addresses, shared likewise.
        value: what is written.
        decay: logarithm `g` of what remains of the memory, at most 0.
        memory: the memory before the first token.
        real: False for padding, which leaves the memory as it is; None if there is none.
        strength: `b` of the delta rule, from 0 to 1; None where values are written as they are.
    """
    batch, length, heads, width = value.shape
    groups = query.shape[2]
    query, key, value, decay = (x.astype(jnp.float32) for x in (query, key, value, decay))
    if real is not None:
        decay = jnp.where(real[..., None], decay, 0.0)
        if strength is None:
            value = jnp.where(real[..., None, None], value, 0.0)
        else:
            strength = jnp.where(real[..., None], strength, 0.0)
    shape = (batch, groups, heads // groups)
    memory = memory.astype(jnp.float32).reshape(*shape, *memory.shape[2:])
    value = value.reshape(batch, length, *shape[1:], width)
    decay = decay.reshape(batch, length, *shape[1:])
    if strength is not None:
        strength = strength.astype(jnp.float32).reshape(decay.shape)
    reading = _step if length == 1 else _chunks
    read, memory = reading(query, key, value, decay, memory, strength)
    return read.reshape(batch, length, heads, width), memory.reshape(batch, heads, *memory.shape[3:])


# Below, heads are two axes: g for groups, r for the heads of one; k and v run over keys and values.


def _step(query: Array, key: Array, value: Array, decay: Array, memory: Array, strength: Array | None) -> Any:
    """One token."""
    query, key, value, decay = (x[:, 0] for x in (query, key, value, decay))
    memory = memory * jnp.exp(decay)[..., None, None]
    if strength is not None:
        value = strength[:, 0, ..., None] * (value - jnp.einsum("bgk,bgrkv->bgrv", key, memory))
    memory = memory + jnp.einsum("bgk,bgrv->bgrkv", key, value)
    return jnp.einsum("bgk,bgrkv->bgrv", query, memory)[:, None], memory


def _chunks(
    query: Array, key: Array, value: Array, decay: Array, memory: Array, strength: Array | None
) -> Any:
    """All tokens: what does not need the memory is computed of all chunks at once, the rest in a scan."""
    batch, length = value.shape[:2]
    size = min(CHUNK, length)
    query, key, value = (_cut(x, size, axis=-2) for x in (query, key, value))
    decay = _cut(decay, size)
    # Now [chunks, batch, groups, (heads of a group,) tokens, ...].
    since = jnp.cumsum(decay, axis=-1)  # decay since the chunk began
    later = jnp.tril(jnp.ones((size, size), jnp.bool_))
    between = jnp.where(later, since[..., :, None] - since[..., None, :], -jnp.inf)
    between = jnp.exp(between)  # from a token to a later one
    scores = jnp.einsum("nbgik,nbgjk->nbgij", query, key)[:, :, :, None] * between
    owed = None
    if strength is not None:
        # What each token finds of the earlier ones' writing depends on theirs: a triangular system.
        strength = _cut(strength, size)[..., None]
        found = strength * jnp.einsum("nbgik,nbgjk->nbgij", key, key)[:, :, :, None] * between
        known = strength * jnp.exp(since)[..., None] * key[:, :, :, None]
        sides = jnp.concatenate([strength * value, known], axis=-1)
        solved = jax.scipy.linalg.solve_triangular(found, sides, lower=True, unit_diagonal=True)
        value, owed = jnp.split(solved, [value.shape[-1]], axis=-1)
    query = jnp.exp(since)[..., None] * query[:, :, :, None]
    key = jnp.exp(since[..., -1:] - since)[..., None] * key[:, :, :, None]
    left = jnp.exp(since[..., -1])[..., None, None]

    def chunk(memory: Array, of: tuple[Array, Array, Array, Array, Array, Array | None]) -> Any:
        query, key, value, scores, left, owed = of
        if owed is not None:
            value = value - jnp.einsum("bgrik,bgrkv->bgriv", owed, memory)
        read = jnp.einsum("bgrik,bgrkv->bgriv", query, memory)
        read = read + jnp.einsum("bgrij,bgrjv->bgriv", scores, value)
        return memory * left + jnp.einsum("bgrik,bgriv->bgrkv", key, value), read

    memory, read = jax.lax.scan(chunk, memory, (query, key, value, scores, left, owed))
    read = jnp.moveaxis(read, (0, -2), (1, 2))  # [batch, chunks, tokens, groups, heads of a group, value]
    return read.reshape(batch, -1, *read.shape[3:])[:, :length], memory


def _cut(x: Array, size: int, axis: int = -1) -> Array:
    """`[batch, length, ...]` as `[chunks, batch, ...]` with the tokens of a chunk at `axis`.

    The last chunk is filled with zeros, which change no memory.
    """
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))
    x = jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)
    return jnp.moveaxis(x, 2, axis)
