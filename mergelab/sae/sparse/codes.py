"""Codes of a batch, as (value, index) pairs or dense and masked: two ways to compute the same thing.

Pairs cost `2 * tokens * d * n` FLOPs for the encoder and little more; dense codes cost five such products,
but run as plain matrix products. Pairs win where few of many latents fire (`n / k` above ~32 on a CPU) and
on GPUs; dense codes win for small dictionaries, and on TPUs, which have no fast gather.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array

from mergelab.sae.shards import Shards
from mergelab.sae.sparse.rows import add_rows, dot_with_rows, sum_of_rows

__all__ = ["FIRING", "Codes", "DenseCodes", "SparseCodes"]

FIRING = 1e-3
"""A latent fires on a token when its code is above this (arXiv 2406.04093, released code)."""


class Codes(Protocol):
    """Activations of latents on the tokens of a batch, non-negative."""

    def decode(self, decoder: Array) -> Array:
        """`codes @ decoder`: `[n, d_out]` -> `[tokens, d_out]`; this shard's part of the sum."""
        ...

    def fired(self) -> Array:
        """`[n]`, bool: latents that fired on some token of this part of the batch."""
        ...

    def count(self) -> Array:
        """How many (token, latent) pairs are above zero, float32."""
        ...

    def only(self, kept: Array) -> Codes:
        """The codes of some latents, `[n]` bool, and zero for the others."""
        ...


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _sparse_product(values: Array, indices: Array, decoder: Array, platform: str) -> Array:
    return sum_of_rows(values, indices, decoder, platform)


def _forward(
    values: Array, indices: Array, decoder: Array, platform: str
) -> tuple[Array, tuple[Array, Array, Array]]:
    return sum_of_rows(values, indices, decoder, platform), (values, indices, decoder)


def _backward(platform: str, saved: tuple[Array, Array, Array], g: Array) -> tuple[Array, None, Array]:
    values, indices, decoder = saved
    return (
        dot_with_rows(g, indices, decoder, platform),
        None,
        add_rows(values, indices, g, decoder.shape[0], platform),
    )


_sparse_product.defvjp(_forward, _backward)


@partial(jax.tree_util.register_dataclass, data_fields=["values", "indices"], meta_fields=["n", "shards"])
@dataclass(frozen=True)
class SparseCodes:
    """Codes as pairs.

    Attributes:
        values: `[tokens, k]`, zero where a place is not used.
        indices: `[tokens, k]`, int32, local to this shard.
        n: how many latents this shard has.
        shards: the mesh axes.
    """

    values: Array
    indices: Array
    n: int
    shards: Shards

    def decode(self, decoder: Array) -> Array:
        return _sparse_product(self.values, self.indices, decoder, self.shards.platform)

    def fired(self) -> Array:
        return jnp.zeros(self.n, bool).at[self.indices].max(self.values > FIRING)

    def count(self) -> Array:
        return (self.values > 0).sum(dtype=jnp.float32)

    def only(self, kept: Array) -> SparseCodes:
        return replace(self, values=jnp.where(kept[self.indices], self.values, 0))


@partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["shards"])
@dataclass(frozen=True)
class DenseCodes:
    """Codes as a matrix.

    Attributes:
        values: `[tokens, n]`, mostly zero.
        shards: the mesh axes.
    """

    values: Array
    shards: Shards

    def decode(self, decoder: Array) -> Array:
        return self.values @ decoder

    def fired(self) -> Array:
        return (self.values > FIRING).any(axis=0)

    def count(self) -> Array:
        return (self.values > 0).sum(dtype=jnp.float32)

    def only(self, kept: Array) -> DenseCodes:
        return replace(self, values=jnp.where(kept[None, :], self.values, 0))
