"""Masks of several models in one array: eight to a byte."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["pack_masks", "pack_masks_on_host", "unpack_mask"]


def pack_masks(masks: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Bool masks as bits of uint8 arrays of the same shape, eight models to an array."""
    packed = []
    for first in range(0, len(masks), 8):
        word = jnp.zeros_like(masks[first], dtype=jnp.uint8)
        for bit, mask in enumerate(masks[first : first + 8]):
            word = word | (mask.astype(jnp.uint8) << jnp.uint8(bit))
        packed.append(word)
    return tuple(packed)


def pack_masks_on_host(masks: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """The same for numpy arrays; the first mask of each eight becomes their word."""
    packed = []
    for first in range(0, len(masks), 8):
        word = masks[first].view(np.uint8)
        for bit, mask in enumerate(masks[first + 1 : first + 8], start=1):
            word |= mask.view(np.uint8) << np.uint8(bit)
        packed.append(word)
    return tuple(packed)


def unpack_mask(packed: tuple[jax.Array, ...], model: int) -> jax.Array:
    """The bool mask of one model."""
    return (packed[model // 8] >> jnp.uint8(model % 8)) & jnp.uint8(1) == jnp.uint8(1)
