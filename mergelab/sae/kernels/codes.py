"""Sparse codes as (value, index) pairs, and the encoders that give them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from mergelab.compat import register_dataclass
from mergelab.sae.kernels.collectives import Shards
from mergelab.sae.kernels.largest import (
    Largest,
    Ranking,
    largest,
    pre_activations,
    search,
    top_k_by,
)
from mergelab.sae.kernels.rows import add_rows, dot_with_rows, sum_of_rows

__all__ = ["FIRING", "Codes", "DenseCodes", "SparseCodes", "is_active", "top_k_codes"]


FIRING = 1e-3
"""A latent fires on a token when its code is farther from 0 than this (arXiv 2406.04093, released code)."""


def is_active(codes: ArrayLike) -> Any:
    """`codes != 0`, elementwise: whether a latent takes part; codes may have either sign."""
    return codes != 0


class Codes(Protocol):
    """Activations of latents on the tokens of a batch, of either sign."""

    def decode(self, decoder: Array) -> Array:
        """`codes @ decoder`: `[n, d_out]` -> `[tokens, d_out]`; this shard's part of the sum."""
        ...

    def fired(self) -> Array:
        """`[n]`, bool: latents that fired on some token of this part of the batch."""
        ...

    def count(self) -> Array:
        """Number of active (token, latent) pairs, float32."""
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


@partial(register_dataclass, data_fields=["values", "indices"], meta_fields=["n", "shards"])
@dataclass(frozen=True)
class SparseCodes:
    """Codes as pairs.

    Attributes:
        values: `[tokens, k]`, zero where a place is not used.
        indices: `[tokens, k]`, int32, local to this shard.
        n: number of latents of this shard.
        shards: the mesh axes.
    """

    values: Array
    indices: Array
    n: int
    shards: Shards

    def decode(self, decoder: Array) -> Array:
        return _sparse_product(self.values, self.indices, decoder, self.shards.platform)

    def fired(self) -> Array:
        return jnp.zeros(self.n, bool).at[self.indices].max(jnp.abs(self.values) > FIRING)

    def count(self) -> Array:
        return is_active(self.values).sum(dtype=jnp.float32)

    def only(self, kept: Array) -> SparseCodes:
        return replace(self, values=jnp.where(kept[self.indices], self.values, 0))


@partial(register_dataclass, data_fields=["values"], meta_fields=["shards"])
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
        return (jnp.abs(self.values) > FIRING).any(axis=0)

    def count(self) -> Array:
        return is_active(self.values).sum(dtype=jnp.float32)

    def only(self, kept: Array) -> DenseCodes:
        return replace(self, values=jnp.where(kept[None, :], self.values, 0))


_DENSE_BELOW = 32
"""Latents per active latent under which dense codes are faster on a CPU (benchmarks/sae_step.py)."""


def prefers_dense(n_latents: int, k: int, platform: str) -> bool:
    """Whether dense, masked codes are the faster of the two ways for an SAE of this shape."""
    return platform == "tpu" or (platform == "cpu" and n_latents < _DENSE_BELOW * k)


def _best(
    x: Array, encoder: Array, bias: Array, k: int, shards: Shards, compute_dtype: str, ranking: Ranking
) -> Largest:
    found = search(x, encoder, bias, min(k, encoder.shape[0]), shards.platform, compute_dtype, ranking.score)
    return largest(*found, k, shards, ranking.score)


def _encode_forward(
    x: Array, encoder: Array, bias: Array, k: int, shards: Shards, compute_dtype: str, ranking: Ranking
) -> tuple[Largest, tuple[Array, Array, Array]]:
    best = _best(x, encoder, bias, k, shards, compute_dtype, ranking)
    return best, (x, encoder, best.indices)


def _encode_backward(
    k: int,
    shards: Shards,
    compute_dtype: str,
    ranking: Ranking,
    saved: tuple[Array, Array, Array],
    g: Largest,
) -> tuple[Array, Array, Array]:
    x, encoder, indices = saved
    n = encoder.shape[0]
    return (
        sum_of_rows(g.values, indices, encoder, shards.platform),
        add_rows(g.values, indices, x, n, shards.platform),
        jnp.zeros(n, g.values.dtype).at[indices].add(g.values),
    )


_differentiable_best = jax.custom_vjp(_best, nondiff_argnums=(3, 4, 5, 6))
_differentiable_best.defvjp(_encode_forward, _encode_backward)


def top_k_codes(
    x: Array,
    encoder: Array,
    bias: Array,
    ks: Sequence[int | Array],
    k_max: int,
    shards: Shards,
    *,
    ranking: Ranking,
    dense: bool | None = None,
    compute_dtype: str = "float32",
) -> list[Codes]:
    """The codes that keep the k best pre-activations of each token, for several k.

    Args:
        x: `[tokens, d_in]`, centered.
        encoder: `[n, d_in]`, this shard's rows.
        bias: `[n]`.
        ks: numbers of latents to keep, over all shards; may be traced.
        k_max: the largest of them.
        shards: the mesh axes.
        ranking: activation function: which pre-activations are kept, and the codes they become.
        dense: whether to return dense codes; None takes what is faster.
        compute_dtype: see `search` and, for dense codes, `pre_activations`.

    Returns:
        Codes for each of `ks`. Ties go to the lowest latent.
    """
    if dense is None:
        n_latents = encoder.shape[0] * shards.num_latent_shards()
        dense = prefers_dense(n_latents, k_max, shards.platform)
    if not dense:
        best = cast(Largest, _differentiable_best(x, encoder, bias, k_max, shards, compute_dtype, ranking))
        values = ranking.kept(best.values)
        return [
            SparseCodes(jnp.where(best.among(k), values, 0), best.indices, encoder.shape[0], shards)
            for k in ks
        ]
    pre = pre_activations(x, encoder, bias, compute_dtype)
    found = top_k_by(ranking.score, lax.stop_gradient(pre), min(k_max, pre.shape[1]), shards.platform)
    best = largest(*found, k_max, shards, ranking.score)
    return [
        DenseCodes(jnp.where(_kept(pre, best, k, ranking.score), ranking.kept(pre), 0), shards) for k in ks
    ]


def _kept(pre: Array, best: Largest, k: int | Array, score: Callable[[Array], Array] | None) -> Array:
    """`[tokens, n]`, bool: the elements of `pre` that `best` keeps, without a scatter."""
    kept = best.among(k)
    last = jnp.maximum(kept.sum(axis=-1, keepdims=True, dtype=jnp.int32) - 1, 0)
    value = jnp.take_along_axis(best.values, last, axis=1)
    index = jnp.take_along_axis(best.indices, last, axis=1)
    if score is not None:
        pre, value = score(pre), score(value)
    places = jnp.arange(pre.shape[1], dtype=jnp.int32)[None, :]
    chosen = (pre > value) | ((pre == value) & (places <= index))
    return chosen & kept[:, :1]  # a shard may keep none
