"""Relative positions that all blocks of an encoder share: a bias by bucket, or vectors that heads look at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from mergelab.models.derived import param
from mergelab.models.layers.norms import Norm, NormKind

__all__ = [
    "Disentangled",
    "RelativeBias",
    "RelativePlaces",
    "RelativeVectors",
    "buckets_of",
    "disentangled_scores",
    "places_of",
]


@dataclass(frozen=True)
class RelativeBias:
    """One number per head and bucket of distance, added to scores (T5, arXiv:1910.10683; MPNet).

    Half of the buckets are for keys after the query; half of those are single distances, the others grow
    with the logarithm of the distance, up to `reach`.

    Attributes:
        heads: number of heads.
        rows: size of the table.
        buckets: number of buckets in use.
        reach: distance from which on all share the last bucket.
    """

    heads: int
    rows: int
    buckets: int = 32
    reach: int = 128

    def module(self, name: str) -> nn.Module:
        """The module from a length to the bias `[1, heads, query, key]`."""
        return _Bias(self, name=name)


class RelativePlaces(NamedTuple):
    """Vectors of relative positions, and which of them each pair of tokens looks at.

    Attributes:
        vectors: `[1, rows, width]`.
        places: the row of each query and key, `[query, key]`.
    """

    vectors: Float[Array, "1 rows width"]
    places: Int[np.ndarray, "query key"]


@dataclass(frozen=True)
class RelativeVectors:
    """A table of vectors by distance, for `Disentangled` attention (DeBERTa V3, arXiv:2111.09543).

    Attributes:
        width: width of a vector, the residual stream's.
        span: half of the number of rows: distances, or buckets of them, to either side.
        reach: if given, distances of half the span and more share buckets by their logarithm, up to it.
        norm: norm of the vectors, or None.
    """

    width: int
    span: int
    reach: int | None = None
    norm: NormKind | None = None

    def module(self, name: str) -> nn.Module:
        """The module from a length to `RelativePlaces`."""
        return _Vectors(self, name=name)


@dataclass(frozen=True)
class Disentangled:
    """Which scores of relative positions an attention adds to those of contents.

    Attributes:
        content_to_position: whether queries look at the vectors of positions.
        position_to_content: whether vectors of positions look at keys.
        shared: whether the projections of contents project the vectors too.
    """

    content_to_position: bool
    position_to_content: bool
    shared: bool


class _Bias(nn.Module):
    spec: RelativeBias

    @nn.compact
    def __call__(self, length: int) -> Float[Array, "1 heads query key"]:
        spec = self.spec
        table = param(
            self, "embedding", nn.initializers.normal(0.02), (spec.rows, spec.heads), (None, "heads")
        )
        return jnp.take(jnp.asarray(table), buckets_of(length, spec), axis=0).transpose(2, 0, 1)[None]


class _Vectors(nn.Module):
    spec: RelativeVectors

    @nn.compact
    def __call__(self, length: int) -> RelativePlaces:
        spec, shape = self.spec, (2 * self.spec.span, self.spec.width)
        table = jnp.asarray(param(self, "embedding", nn.initializers.normal(0.02), shape, (None, "embed")))
        vectors = table[None] if spec.norm is None else Norm(spec.norm, name="norm")(table[None])
        return RelativePlaces(vectors, places_of(length, spec))


def buckets_of(length: int, spec: RelativeBias) -> Int[np.ndarray, "query key"]:
    """The bucket of each query and key."""
    steps = np.arange(length)
    distance = steps[None] - steps[:, None]
    half = spec.buckets // 2
    exact, far = half // 2, np.abs(distance)
    log = np.log(np.maximum(far, 1).astype(np.float32) / np.float32(exact))
    grown = exact + (log / np.float32(math.log(spec.reach / exact)) * np.float32(half - exact)).astype(int)
    buckets = np.where(far < exact, far, np.minimum(grown, half - 1)) + half * (distance > 0)
    return buckets.astype(np.int32)


def places_of(length: int, spec: RelativeVectors) -> Int[np.ndarray, "query key"]:
    """The vector that each query and key look at."""
    steps = np.arange(length)
    distance = steps[:, None] - steps[None]
    if spec.reach is not None:
        half = spec.span // 2
        far = np.where(np.abs(distance) < half, half - 1, np.abs(distance)).astype(np.float32)
        log = np.log(far / np.float32(half)) / np.log(np.float32((spec.reach - 1) / half))
        grown = np.ceil(log * np.float32(half - 1)) + half
        distance = np.where(far <= half, distance, grown * np.sign(distance)).astype(int)
    return np.clip(distance + spec.span, 0, 2 * spec.span - 1).astype(np.int32)


def disentangled_scores(
    query: Float[Array, "batch query heads head_dim"],
    key: Float[Array, "batch key heads head_dim"],
    position_query: Float[Array, "1 rows heads head_dim"] | None,
    position_key: Float[Array, "1 rows heads head_dim"] | None,
    places: Int[np.ndarray, "query key"],
) -> Float[Array, "batch heads query key"]:
    """What relative positions add to the unscaled scores (DeBERTa, arXiv:2006.03654, equation 4), float32.

    Args:
        query: queries of the contents.
        key: keys of the contents.
        position_query: queries of the vectors of positions, where these look at contents.
        position_key: keys of the vectors of positions, where contents look at these.
        places: the vector of each pair.
    """
    found = jnp.zeros((query.shape[0], query.shape[2], query.shape[1], key.shape[1]), jnp.float32)
    if position_key is not None:
        every = jnp.einsum("bihd,rhd->bhir", query, position_key[0], preferred_element_type=jnp.float32)
        found += jnp.take_along_axis(every, jnp.asarray(places)[None, None], axis=-1)
    if position_query is not None:
        every = jnp.einsum("bjhd,rhd->bhjr", key, position_query[0], preferred_element_type=jnp.float32)
        turned = jnp.take_along_axis(every, jnp.asarray(places.T)[None, None], axis=-1)
        found += turned.swapaxes(-1, -2)
    return found
