"""The largest pre-activations: of each token, of a batch, and above a threshold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import jax.numpy as jnp
from jax import Array, lax

from mergelab.compat import register_dataclass
from mergelab.sae.kernels.collectives import ONE_DEVICE, Shards
from mergelab.sae.kernels.dispatch import Forms
from mergelab.sae.kernels.rows import dot_with_rows

__all__ = [
    "Largest",
    "Ranking",
    "kth_largest",
    "largest",
    "pre_activations",
    "search",
    "top_k",
    "top_k_by",
]

Score = Callable[[Array], Array] | None
"""Ranks pre-activations, elementwise; None ranks them by their value."""


class Ranking(Protocol):
    """Which pre-activations of a token are kept, and as what codes."""

    score: Score

    @staticmethod
    def kept(pre: Array) -> Array:
        """The code of a latent that is kept."""
        ...


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


_GROUP = 16


def _plain(x: Array, k: int) -> tuple[Array, Array]:
    values, indices = lax.top_k(x, k)
    # Without the barrier XLA's CPU backend turns a top-k whose result is used in part into a full sort. The
    # third operand keeps XLA from passing the pair to the barrier as it is, which its sort pass cannot take.
    values, indices, _ = lax.optimization_barrier((values, indices, jnp.zeros((), jnp.int32)))
    return values, indices


def top_k(x: Array, k: int, platform: str = "cpu") -> tuple[Array, Array]:
    """The k largest elements of each row.

    Args:
        x: `[tokens, n]`, no NaN.
        k: number of elements, at most n.
        platform: platform that the program is compiled for.

    Returns:
        Values `[tokens, k]`, falling, and their indices `[tokens, k]`, int32: those of `lax.top_k`.
    """
    return TOP_K.on(platform)(x, k)


def _grouped(x: Array, k: int) -> tuple[Array, Array]:
    """The k groups with the largest maxima hold the k largest; only those are sorted."""
    tokens, n = x.shape
    if n % _GROUP or n < 4 * _GROUP * k:
        return _plain(x, k)
    groups = x.reshape(tokens, n // _GROUP, _GROUP)
    _, chosen = _plain(groups.max(axis=-1), k)
    chosen = jnp.sort(chosen, axis=-1)
    candidates = jnp.take_along_axis(groups, chosen[:, :, None], axis=1).reshape(tokens, k * _GROUP)
    values, place = _plain(candidates, k)
    group = jnp.take_along_axis(chosen, place // _GROUP, axis=1)
    return values, group * _GROUP + place % _GROUP


TOP_K = Forms(reference=_plain, cpu=_grouped, gpu=_grouped)


def top_k_by(score: Score, x: Array, k: int, platform: str = "cpu") -> tuple[Array, Array]:
    """The k elements of each row with the largest score, best first: like `top_k`."""
    if score is None:
        return top_k(x, k, platform)
    _, indices = top_k(score(x), k, platform)
    return jnp.take_along_axis(x, indices, axis=-1), indices


@partial(
    register_dataclass,
    data_fields=["values", "indices", "winners"],
    meta_fields=["shards"],
)
@dataclass(frozen=True)
class Largest:
    """The largest elements of rows that are split over the mesh, as one shard sees them.

    Attributes:
        values: `[tokens, own]`, the largest of this shard's columns, falling.
        indices: `[tokens, own]`, int32, their columns in this shard.
        winners: `[tokens, k]`, which candidates are the k largest of the whole row, falling: places in the
            lists of all shards side by side.
        shards: the mesh axes.
    """

    values: Array
    indices: Array
    winners: Array
    shards: Shards

    def among(self, k: int | Array) -> Array:
        """`[tokens, own]`, bool: whether each value is among the k largest of the whole row.

        Ties go to the lowest global index, so these are exactly the elements that `lax.top_k` takes.
        """
        own = self.values.shape[-1]
        counts = jnp.arange(self.winners.shape[-1], dtype=jnp.int32)[None, :] < k
        if self.shards.latents is None:
            return jnp.broadcast_to(counts[:, :own], self.values.shape)
        place = self.winners - self.shards.latent_offset(own)
        # A shard's largest come first in its own list, so what it keeps is a prefix of it.
        kept = (counts & (place >= 0) & (place < own)).sum(axis=-1, keepdims=True, dtype=jnp.int32)
        return jnp.arange(own, dtype=jnp.int32)[None, :] < kept


def largest(
    values: Array, indices: Array, k: int, shards: Shards = ONE_DEVICE, score: Score = None
) -> Largest:
    """The k largest of each row, from the largest of each shard's columns.

    Args:
        values: `[tokens, own]`, the largest of this shard, falling; k of them if it has so many columns.
        indices: `[tokens, own]`, int32, their columns.
        k: number of elements over all shards.
        shards: the mesh axes.
        score: function that ranks.
    """
    own = values.shape[-1]
    everyone = shards.gather_latents(values if score is None else score(values))
    if shards.latents is None:
        winners = jnp.broadcast_to(jnp.arange(own, dtype=jnp.int32), values.shape)
    else:
        # A tie goes to the first place, which is the lower shard, which holds the lower indices.
        _, winners = _plain(everyone, k)
    return Largest(values, indices, winners, shards)


_PIECE_ROWS = {"cpu": 256}
"""Tokens at a time: touching new memory for the pre-activations of all of them costs a CPU more than the
products of small pieces do (benchmarks/sae_step.py)."""

_PIECE_BYTES = {"cpu": 1 << 26}
_LARGE_PIECE_BYTES = 1 << 30
"""Of the pre-activations held at a time. An accelerator wants large products, but has only so much memory."""

_SPARE = 4
"""With half-precision screening, `k / _SPARE` more candidates than k are scored again in float32."""


def pre_activations(x: Array, encoder: Array, bias: Array, compute_dtype: str = "float32") -> Array:
    """`x @ encoder.T + bias`: `[tokens, d_in]`, `[n, d_in]`, `[n]` -> `[tokens, n]`, float32.

    Args:
        x: activations.
        encoder: rows of encoder weights.
        bias: bias of each latent.
        compute_dtype: dtype that the factors of the product are rounded to; sums are float32.
    """
    product = lax.dot_general(
        x.astype(compute_dtype),
        encoder.astype(compute_dtype),
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    return product + bias[None, :]


def search(
    x: Array,
    encoder: Array,
    bias: Array,
    k: int,
    platform: str,
    compute_dtype: str = "float32",
    score: Score = None,
) -> tuple[Array, Array]:
    """The k largest pre-activations of each token.

    Args:
        x: `[tokens, d_in]`, centered.
        encoder: `[n, d_in]`.
        bias: `[n]`.
        k: number of elements, at most n.
        platform: platform that the program is compiled for.
        compute_dtype: other than float32, products in it only choose whom to look at; the values of these
            candidates, and the choice among them, are float32.
        score: function that ranks.

    Returns:
        Values `[tokens, k]`, falling, and indices `[tokens, k]`, int32. Ties go to the lowest index.
    """
    n = encoder.shape[0]
    rounded = encoder.astype(compute_dtype)  # once, not for each piece

    def find(x: Array) -> tuple[Array, Array]:
        pre = pre_activations(x, rounded, bias, compute_dtype)
        if compute_dtype == "float32":
            return top_k_by(score, pre, k, platform)
        _, candidates = top_k_by(score, pre, min(k + k // _SPARE, n), platform)
        candidates = jnp.sort(candidates, axis=-1)  # so that ties go to the lowest index
        exact = dot_with_rows(x, candidates, encoder, platform) + bias[candidates]
        values, places = top_k_by(score, exact, k, platform)
        return values, jnp.take_along_axis(candidates, places, axis=1)

    rows = max(_PIECE_BYTES.get(platform, _LARGE_PIECE_BYTES) // (4 * n), 1)
    return _in_pieces(find, x, min(rows, _PIECE_ROWS.get(platform, rows)))


def _in_pieces(
    function: Callable[[Array], tuple[Array, Array]], x: Array, at_once: int
) -> tuple[Array, Array]:
    """`function(x)`, for at most `at_once` rows at a time."""
    tokens = x.shape[0]
    pieces = -(-tokens // at_once)
    if pieces == 1:
        return function(x)
    rows = -(-tokens // pieces)
    filled = jnp.pad(x, ((0, pieces * rows - tokens), (0, 0)))
    values, indices = lax.map(function, filled.reshape(pieces, rows, -1))
    k = values.shape[-1]
    return values.reshape(-1, k)[:tokens], indices.reshape(-1, k)[:tokens]
