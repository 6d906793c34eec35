"""A dictionary's reconstruction and sparsity on a model's activations, streamed, and its densities."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from mergelab.activations.capture import ModelActivations
from mergelab.sae.dictionary import Dictionary
from mergelab.sae.evaluation.passes import encode_and_reconstruct, read_pairs
from mergelab.sae.evaluation.reconstruction import Reconstruction, Totals, density_histogram

__all__ = ["DENSITY_EDGES", "Densities", "densities", "reconstruction_on_model"]

DENSITY_EDGES = np.arange(-7.0, 0.5, 0.5)
"""Bins of the density histogram: logarithms to base 10 of the part of tokens a latent is active on."""


def reconstruction_on_model(
    dictionary: Dictionary, source: ModelActivations, *, contexts: int | None = None
) -> Reconstruction:
    """Encodes the source's first site and reconstructs what the dictionary writes, with sums in float64.

    Args:
        dictionary: reads it; figures are of the site it writes (`check_target`).
        source: model and text.
        contexts: use so many of the text's; all by default.

    Raises:
        SAEError: the dictionary does not fit the sites, or their activations do not vary.
    """
    totals: Totals | None = None
    rows = source.batch * source.tokens.shape[1]
    for x, y in read_pairs(dictionary, source, contexts):
        filled = np.pad(x, ((0, rows - len(x)), (0, 0)))  # one shape, one program
        codes, out = encode_and_reconstruct(dictionary, jnp.asarray(filled))
        totals = totals or Totals.zero(y, dictionary.n_latents)
        totals = totals.add(y, np.asarray(out)[: len(x)], np.asarray(codes)[: len(x)])
    assert totals is not None, "a source has at least one context"
    return totals.result()


@dataclass(frozen=True)
class Densities:
    """How often latents are active.

    Attributes:
        counts: `[bins]`, latents by `log10` of their density, in the bins of `DENSITY_EDGES`.
        silent: latents active on no token.
        median: of the density of those active at all, as a `log10`; NaN if none is.
        dense: latents active on more than a tenth of the tokens.
    """

    counts: np.ndarray
    silent: int
    median: float
    dense: int


def densities(part_of_tokens: np.ndarray) -> Densities:
    """Sums up `Reconstruction.densities` `[n_latents]`."""
    counts, silent = density_histogram(part_of_tokens, DENSITY_EDGES)
    active = part_of_tokens[part_of_tokens > 0]
    median = float(np.median(np.log10(active))) if len(active) else float("nan")
    return Densities(counts, silent, median, int((part_of_tokens > 0.1).sum()))
