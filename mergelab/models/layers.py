"""Layers that transformer families share: RMS norm, rotary positions, causal grouped-query attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

__all__ = ["Linear", "RMSNorm", "causal_attention", "matmul", "rotary_angles", "rotate"]


def matmul(
    x: Float[Array, "batch length width"], kernel: Float[Array, "width features"]
) -> Float[Array, "batch length features"]:
    """`x @ kernel`, as one 2-D product: on CPU its gradient is twice as fast as that of a 3-D one."""
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


class Linear(nn.Module):
    """`x @ kernel`, kernel `[in, out]`, no bias.

    Attributes:
        features: width of the output.
        initial_gain: the initial kernel is normal with deviation `initial_gain / sqrt(in)`.
    """

    features: int
    initial_gain: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length features"]:
        initial = nn.initializers.variance_scaling(self.initial_gain**2, "fan_in", "normal")
        return matmul(x, self.param("kernel", initial, (x.shape[-1], self.features)))


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * scale` over the last axis (Zhang & Sennrich, arXiv:1910.07467)."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        normed = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return jnp.broadcast_to(scale, x.shape) * normed


def rotary_angles(length: int, head_dim: int, theta: float) -> Float[Array, "length half"]:
    """Angle of every position and frequency: `position * theta^(-2 i / head_dim)` (arXiv:2104.09864).

    Args:
        length: number of positions, counted from 0.
        head_dim: width of one head, even.
        theta: the base of the frequencies (`rope_theta`).
    """
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    return jnp.outer(jnp.arange(length, dtype=jnp.float32), 1.0 / jnp.float32(theta) ** exponents)


def rotate(
    x: Float[Array, "batch length heads head_dim"], angles: Float[Array, "length half"]
) -> Float[Array, "batch length heads head_dim"]:
    """Rotates each pair (`i`, `i + head_dim/2`) of a head by its angle: the half-split layout of HF Llama."""
    cos = jnp.cos(angles)[None, :, None, :]
    sin = jnp.sin(angles)[None, :, None, :]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def causal_attention(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
) -> Float[Array, "batch length heads head_dim"]:
    """Causal softmax attention; consecutive groups of `heads / kv_heads` query heads share one key head."""
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("bqkgd,bskd->bkgqs", grouped, key) / jnp.sqrt(jnp.float32(head_dim))
    visible = jnp.tril(jnp.ones((length, length), dtype=bool))[None, None, None]
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    mixed = jnp.einsum("bkgqs,bskd->bqkgd", weights, value)
    return mixed.reshape(batch, length, heads, head_dim)
