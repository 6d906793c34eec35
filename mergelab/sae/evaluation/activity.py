"""How strongly latents are active when they are, and with which others: histograms and co-activation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mergelab.activations.capture import ModelActivations
from mergelab.sae.dictionary import Dictionary
from mergelab.sae.evaluation.host import check_reads
from mergelab.sae.evaluation.passes import read_batches

__all__ = ["Activity", "activity"]


@dataclass(frozen=True)
class Activity:
    """What some latents did on a text.

    Attributes:
        latents: `[m]`, their numbers.
        histogram: `[m, bins]`, int64, tokens by activation, in equal bins from 0 to each latent's peak;
            tokens on which it is not active are in none.
        mean: `[m]`, mean activation where active; 0 for those never active.
        neighbours: `[m, most]`, the numbers of the latents most often active on the same tokens, among `m`.
        likeness: `[m, most]`, tokens on which both are active over the geometric mean of those of each.
    """

    latents: np.ndarray
    histogram: np.ndarray
    mean: np.ndarray
    neighbours: np.ndarray
    likeness: np.ndarray


def activity(
    dictionary: Dictionary,
    source: ModelActivations,
    latents: np.ndarray,
    peak: np.ndarray,
    *,
    bins: int = 20,
    most: int = 6,
    contexts: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Activity:
    """One pass over a text; memory is `4 m^2` bytes besides the codes of a pass.

    Args:
        dictionary: reads the first of the source's sites.
        source: the activations.
        latents: `[m]`, those to look at.
        peak: `[n_latents]`, the largest activation of each on this text (`Survey.peak`).
        bins: of a histogram.
        most: neighbours per latent, fewer where there are not so many latents.
        contexts: use so many of the text's; all by default.
        progress: is told contexts done and contexts in all.

    Raises:
        SAEError: the dictionary does not fit the site.
    """
    check_reads(dictionary, source)
    chosen = jnp.asarray(latents, jnp.int32)
    scale = jnp.asarray(np.where(peak[latents] > 0, peak[latents], 1), jnp.float32)
    m, rows = len(latents), source.batch * source.tokens.shape[1]
    histogram, total = np.zeros((m, bins), np.int64), np.zeros(m)
    # Counts of one pass are exact in float32; their sum over passes is taken in float64.
    together = np.zeros((m, m))
    every = min(len(source.tokens), contexts or len(source.tokens))
    for number, x in enumerate(read_batches(source, contexts), 1):
        filled = np.pad(x, ((0, rows - len(x)), (0, 0)))
        real = jnp.arange(rows) < len(x)
        counts, sums, both = _count(dictionary, jnp.asarray(filled), real, chosen, scale, bins=bins)
        histogram += np.asarray(counts)
        total += np.asarray(sums, np.float64)
        together += np.asarray(both)
        progress(min(number * source.batch, every), every)
    times = np.diag(together).copy()
    norm = np.sqrt(np.maximum(times, 1))
    alike = together / norm[:, None] / norm[None, :]
    np.fill_diagonal(alike, -1)
    order = np.argsort(-alike, axis=1, kind="stable")[:, : min(most, m - 1)]
    return Activity(
        latents=np.asarray(latents),
        histogram=histogram,
        mean=total / np.maximum(times, 1),
        neighbours=np.asarray(latents)[order],
        likeness=np.take_along_axis(alike, order, axis=1),
    )


@partial(jax.jit, static_argnames="bins")
def _count(
    dictionary: Dictionary, x: Array, real: Array, latents: Array, scale: Array, *, bins: int
) -> tuple[Array, Array, Array]:
    codes = jnp.where(real[:, None], dictionary.encode(x)[:, latents], 0)
    active = codes > 0
    place = jnp.clip(jnp.floor(codes / scale[None] * bins).astype(jnp.int32), 0, bins - 1)
    counts = [((place == b) & active).sum(axis=0, dtype=jnp.int32) for b in range(bins)]
    on = active.astype(jnp.float32)
    return jnp.stack(counts, axis=1), codes.sum(axis=0), on.T @ on
