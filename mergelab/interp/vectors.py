"""Algebra of directions: vectors of length 1, what is left without others, and which way means differ."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from mergelab.errors import SiteError

__all__ = ["mean_difference", "mean_norm", "principal_difference", "project_out", "unit", "with_strength"]

_NOTHING = 1e-30


def unit(vectors: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
    """The vectors at length 1, float32; one that is zero stays zero, so that it never becomes NaN."""
    vectors = jnp.asarray(vectors, jnp.float32)
    norms = jnp.linalg.norm(vectors, axis=-1, keepdims=True)
    return jnp.where(norms > _NOTHING, vectors / jnp.maximum(norms, _NOTHING), jnp.zeros_like(vectors))


def project_out(
    vector: Float[Array, " width"], others: Float[Array, "others width"]
) -> Float[Array, " width"]:
    """What is left of a vector orthogonal to all of the others, which need not be independent; float32."""
    vector, others = jnp.asarray(vector, jnp.float32), jnp.atleast_2d(jnp.asarray(others, jnp.float32))
    _, values, rows = jnp.linalg.svd(unit(others), full_matrices=False)
    # Others that depend on those before them span nothing new: their singular value is rounding.
    basis = rows * (values > 1e-5 * jnp.maximum(values[0], _NOTHING)).astype(jnp.float32)[:, None]
    return vector - jnp.matmul(jnp.matmul(vector, basis.T, precision="highest"), basis, precision="highest")


def mean_difference(
    positive: Float[Array, "positive width"], negative: Float[Array, "negative width"]
) -> Float[Array, " width"]:
    """`mean(positive) - mean(negative)`, float32: a contrastive steering vector (arXiv:2312.06681)."""
    _check_widths(positive, negative)
    return jnp.asarray(positive, jnp.float32).mean(0) - jnp.asarray(negative, jnp.float32).mean(0)


def principal_difference(
    positive: Float[Array, "pairs width"], negative: Float[Array, "pairs width"]
) -> Float[Array, " width"]:
    """The first principal axis of the differences of pairs, not centered, of length 1 (arXiv:2310.01405).

    It is the `v` that maximizes the mean of `((p - n) . v)^2`, turned so that `v . mean(p - n) >= 0`.

    Raises:
        SiteError: the two do not pair up.
    """
    _check_widths(positive, negative)
    if positive.shape != negative.shape:
        raise SiteError(
            f"{positive.shape[0]} positive and {negative.shape[0]} negative activations do not form pairs; "
            "give as many of both, or take the difference of their means."
        )
    differences = jnp.asarray(positive, jnp.float32) - jnp.asarray(negative, jnp.float32)
    axis = jnp.linalg.svd(differences, full_matrices=False)[2][0]
    return jnp.where(axis @ differences.mean(0) < 0, -axis, axis)


def mean_norm(activations: Float[Array, "*rows width"]) -> Float[Array, ""]:
    """The mean length of activations, float32: the unit in which steering strengths are given."""
    return jnp.linalg.norm(jnp.asarray(activations, jnp.float32), axis=-1).mean()


def with_strength(
    vector: Float[Array, " width"], strength: Any, norm: Float[Array, ""] | float
) -> Float[Array, " width"]:
    """The vector at length `strength * norm`, float32.

    Args:
        vector: vector of any norm.
        strength: a signed multiple of `norm`; 1 adds as much as an average activation is long.
        norm: `mean_norm` of activations at the site.
    """
    return unit(vector) * jnp.asarray(strength, jnp.float32) * jnp.asarray(norm, jnp.float32)


def _check_widths(positive: Array, negative: Array) -> None:
    if jnp.ndim(positive) != 2 or jnp.ndim(negative) != 2 or positive.shape[1] != negative.shape[1]:
        raise SiteError(
            f"activations of shape {list(positive.shape)} and {list(negative.shape)} cannot be compared; "
            "expected [n, width] for both."
        )
