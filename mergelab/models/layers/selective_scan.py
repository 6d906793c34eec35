"""The selective scan of Mamba: every channel keeps a few numbers that fade at rates of their own.

`h_t = exp(d_t A) h_{t-1} + d_t x_t B_t`, read as `y_t = h_t . C_t` (Gu & Dao, arXiv:2312.00752). As decays
differ by channel and by number, there is no form of matrix products; within a chunk of tokens the sums are
taken as an associative scan, from chunk to chunk one after the other.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

__all__ = ["CHUNK", "selective_scan"]

CHUNK = 32
"""Tokens of a chunk, whose states are in memory at once."""


def selective_scan(
    x: Float[Array, "batch length channels"],
    step: Float[Array, "batch length channels"],
    rate: Float[Array, "channels numbers"],
    into: Float[Array, "batch length numbers"],
    out: Float[Array, "batch length numbers"],
    memory: Float[Array, "batch channels numbers"],
    real: Bool[Array, "batch length"] | None = None,
) -> tuple[Float[Array, "batch length channels"], Float[Array, "batch channels numbers"]]:
    """What every token reads of its channels' memory, and the memory after the last token; float32.

    Args:
        x: what is written.
        step: `d`, positive: how far a token moves the memory.
        rate: `A`, negative.
        into: `B`: how numbers are written, shared by the channels.
        out: `C`: how they are read.
        memory: `h` before the first token.
        real: False for padding, which leaves the memory as it is; None if there is none.
    """
    x, step, rate, into, out, memory = (y.astype(jnp.float32) for y in (x, step, rate, into, out, memory))
    if real is not None:
        step = jnp.where(real[..., None], step, 0.0)
    length = x.shape[1]
    if length == 1:
        decay, added = _moves(x[:, 0], step[:, 0], rate, into[:, 0])
        memory = jnp.exp(decay) * memory + added
        return jnp.einsum("bdn,bn->bd", memory, out[:, 0])[:, None], memory
    size = min(CHUNK, length)
    cut = tuple(_cut(y, size) for y in (x, step, into, out))

    def chunk(memory: Array, of: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
        x, step, into, out = of
        decay, added = jax.lax.associative_scan(_then, _moves(x, step, rate, into), axis=1)
        states = jnp.exp(decay) * memory[:, None] + added
        return states[:, -1], jnp.einsum("bldn,bln->bld", states, out)

    memory, read = jax.lax.scan(chunk, memory, cut)
    return jnp.moveaxis(read, 0, 1).reshape(x.shape[0], -1, x.shape[2])[:, :length], memory


def _moves(x: Array, step: Array, rate: Array, into: Array) -> tuple[Array, Array]:
    """What a token does to the memory: the logarithm of what remains, and what is added, `[..., d, n]`."""
    wide = step[..., None]
    lead = (None,) * (step.ndim - 1)
    return wide * rate[lead], wide * x[..., None] * into[..., None, :]


def _then(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
    """Two moves as one."""
    return first[0] + second[0], jnp.exp(second[0]) * first[1] + second[1]


def _cut(x: Array, size: int) -> Any:
    """`[chunks, batch, tokens, ...]`; the last chunk is filled with zeros, which change no memory."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size), (0, 0)])
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, x.shape[2]), 1, 0)
