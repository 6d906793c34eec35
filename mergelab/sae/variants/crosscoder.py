"""Crosscoders: one set of latents for the activations of several layers or models.

Lindsey et al., "Sparse crosscoders for cross-layer features and model diffing" (2024). The activations stand
side by side, site by site, so a latent has an encoder and a decoder row of `sites * d_model`: per site its
parts.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from mergelab.sae.sparse.rows import row_dot
from mergelab.sae.variants.top_k import TopK
from mergelab.sae.variants.variant import Variant

__all__ = ["crosscoder", "site_norms"]


def crosscoder(
    d_model: int, sites: int, n_latents: int, *, kind: type[Variant] = TopK, **options: Any
) -> Variant:
    """A crosscoder over `sites` activations of width `d_model`: any kind of sparse code.

    A kind with a penalty weighs each code by the sum over sites of its decoder's norms, so that a latent may
    live at one site or at many at the same price.

    Args:
        d_model: width of each activation.
        sites: how many.
        n_latents: how many latents.
        kind: the kind of code.
        **options: of the kind, such as `k`.
    """
    return kind(d_in=sites * d_model, n_latents=n_latents, sites=sites, **options)


def site_norms(decoder: Array, sites: int) -> Array:
    """Decoder norms by site: `[n, sites * d_model]` -> `[n, sites]`; where each latent lives."""
    n, width = decoder.shape
    parts = decoder.reshape(n * sites, width // sites)
    return jnp.sqrt(row_dot(parts, parts)).reshape(n, sites)
