"""The shape that a group of features makes together: principal components of what they alone reconstruct.

Features that come in groups, such as days of the week, can lie on a circle that no single one shows. Engels
et al. 2024 (arXiv:2405.14860) reconstruct activations from one group of latents, keep the tokens on which any
of them is active, and look at the principal components.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from mergelab.activations.batches import filled_batches
from mergelab.compat import register_dataclass
from mergelab.errors import SAEError
from mergelab.sae.activation_functions import is_active
from mergelab.sae.sae import SAE

__all__ = ["PCA", "Manifold", "feature_manifold", "pca", "similar_latents"]


@register_dataclass
@dataclass(frozen=True)
class PCA:
    """Principal components.

    Attributes:
        mean: float32 `[width]`.
        components: float32 `[k, width]`, orthonormal, that of the largest variance first; the largest
            entry of each is positive.
        variances: float32 `[k]`, along each (unbiased).
        ratios: float32 `[k]`, of the whole variance.
    """

    mean: Float[Array, " width"]
    components: Float[Array, "k width"]
    variances: Float[Array, " k"]
    ratios: Float[Array, " k"]

    def project(self, x: Float[Array, "rows width"]) -> Float[Array, "rows k"]:
        """Coordinates of points."""
        return jnp.matmul(x - self.mean[None], self.components.T, precision="highest")


@dataclass(frozen=True)
class Manifold:
    """What a group of latents draws.

    Attributes:
        latents: the group.
        rows: `[points]`, the numbers of the tokens on which any of them is active.
        points: float32 `[points, k]`, in principal components.
        pca: the components.
    """

    latents: tuple[int, ...]
    rows: np.ndarray
    points: np.ndarray
    pca: PCA


def pca(x: Float[Array, "rows width"], k: int) -> PCA:
    """Principal components of rows, through a singular value decomposition.

    Raises:
        SAEError: there are fewer than 2 rows, or than k directions.
    """
    x = jnp.asarray(x, jnp.float32)
    if x.ndim != 2 or len(x) < 2 or not 1 <= k <= min(x.shape):
        raise SAEError(f"{k} principal components cannot be taken of an array of shape {list(x.shape)}.")
    mean = x.mean(axis=0)
    _, sizes, right = jnp.linalg.svd(x - mean[None], full_matrices=False)
    variances = jnp.square(sizes) / (len(x) - 1)
    right = right[:k]
    largest = jnp.take_along_axis(right, jnp.abs(right).argmax(axis=1)[:, None], axis=1)
    total = variances.sum()
    ratios = variances[:k] / jnp.where(total > 0, total, 1.0)
    return PCA(mean, right * jnp.where(largest < 0, -1.0, 1.0), variances[:k], ratios)


def feature_manifold(sae: SAE, activations: Any, latents: Any, *, k: int = 3, batch: int = 4096) -> Manifold:
    """Principal components of `sum_i f_i d_i` over a group, on the tokens where any `f_i` is above 0.

    Args:
        sae: SAE of the site the activations are from.
        activations: `[rows, d_in]`, on the host.
        latents: the group.
        k: components.
        batch: rows encoded at a time.

    Raises:
        SAEError: a latent does not exist, or too few tokens make the group active.
    """
    group = np.asarray(latents, np.int32)
    if group.ndim != 1 or not group.size or ((group < 0) | (group >= sae.n_latents)).any():
        raise SAEError(f"latents {group.tolist()} are not a group of the SAE's {sae.n_latents}.")
    rows = np.asarray(activations, np.float32)
    parts = []
    for (filled,), count in filled_batches(min(batch, len(rows)), rows):
        parts.append(np.asarray(_codes_of(sae, filled, group))[:count])
    codes = np.concatenate(parts)
    active = np.flatnonzero(is_active(codes).any(axis=1))
    if len(active) < max(2, k):
        raise SAEError(
            f"latents {group.tolist()} are active on {len(active)} of {len(rows)} tokens, too few for {k} "
            "principal components; give more text, or another group."
        )
    drawn = codes[active] @ np.asarray(sae.W_dec, np.float32)[group]
    found = pca(jnp.asarray(drawn), k)
    return Manifold(tuple(group.tolist()), active, np.asarray(found.project(jnp.asarray(drawn))), found)


def similar_latents(sae: SAE, latent: int, count: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """The latents whose decoder rows have the largest cosines with one's, itself first, and the cosines.

    Raises:
        SAEError: the latent does not exist.
    """
    if not 0 <= latent < sae.n_latents:
        raise SAEError(f"latent {latent} does not exist: the SAE has {sae.n_latents}.")
    rows = np.asarray(sae.W_dec, np.float32)
    norms = np.linalg.norm(rows, axis=1)
    scale = norms * norms[latent]
    cosines = rows @ rows[latent] / np.where(scale > 0, scale, 1)
    order = np.argsort(-cosines, kind="stable")[:count]
    return order, cosines[order]


@jax.jit
def _codes_of(sae: SAE, x: Array, latents: Array) -> Array:
    return sae.encode(x)[:, latents]
