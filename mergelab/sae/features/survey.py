"""Where, how often and how strongly latents are active, and with whom."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mergelab.activations.capture import ModelActivations
from mergelab.errors import SAEError
from mergelab.sae.sae import SAE
from mergelab.sae.splice import encode, read_batches
from mergelab.sae.subject_model import check_reads

__all__ = ["Activity", "Example", "Survey", "activity", "survey"]


@dataclass(frozen=True)
class Example:
    """One context in which a latent is active.

    Attributes:
        context: its number among the source's.
        tokens: token ids of the context.
        codes: the latent's activation on each of them.
    """

    context: int
    tokens: tuple[int, ...]
    codes: tuple[float, ...]

    @property
    def peak(self) -> float:
        """The largest activation."""
        return max(self.codes)


@dataclass(frozen=True)
class Survey:
    """What latents did on a text.

    Attributes:
        rows: tokens seen.
        density: `[n_latents]`, the part of the tokens each latent is active on.
        peak: `[n_latents]`, the largest activation of each.
        examples: by latent, the contexts with the largest activations, the largest first; exact.
    """

    rows: int
    density: np.ndarray
    peak: np.ndarray
    examples: dict[int, list[Example]]


def survey(
    sae: SAE,
    source: ModelActivations,
    *,
    count: int = 5,
    latents: Sequence[int] | None = None,
    contexts: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Survey:
    """Runs an SAE over a text once, keeping each latent's strongest contexts.

    Args:
        sae: reads the first of the source's sites.
        source: the activations.
        count: contexts kept per latent; of equal ones the first.
        latents: those to keep examples of; all by default.
        contexts: use so many of the text's; all by default.
        progress: is told contexts done and contexts in all.

    Raises:
        SAEError: the SAE reads activations of another width.
    """
    if source.widths[0] != sae.d_in:
        raise SAEError(
            f"the SAE reads activations {sae.d_in} wide, but site {source.sites[0]!r} gives "
            f"{source.widths[0]}; take the site it was trained on."
        )
    total, length = source.tokens.shape
    total = min(total, contexts or total)
    active = np.zeros(sae.n_latents, np.int64)
    peak = np.zeros(sae.n_latents, np.float32)
    wanted = range(sae.n_latents) if latents is None else latents
    heaps: dict[int, list[tuple[float, int, tuple[float, ...]]]] = {int(latent): [] for latent in wanted}
    # What a latent's peak in a context must exceed to be kept; nothing does for those not asked for.
    floor = np.full(sae.n_latents, np.inf, np.float32)
    floor[list(heaps)] = 0
    for start in range(0, total, source.batch):
        stop = min(start + source.batch, total)
        rows = source.read_sites(start * length, stop * length)[0]
        filled = np.pad(rows, ((0, source.batch * length - len(rows)), (0, 0)))  # one shape, one program
        codes = np.asarray(encode(sae, jnp.asarray(filled)))[: len(rows)]
        active += (codes > 0).sum(axis=0)
        codes = codes.reshape(stop - start, length, -1)
        peaks = codes.max(axis=1)
        peak = np.maximum(peak, peaks.max(axis=0))
        for i, latent in np.argwhere(peaks > floor[None]).tolist():
            heap = heaps[latent]
            item = (float(peaks[i, latent]), -(start + i), tuple(codes[i, :, latent].tolist()))
            if len(heap) < count:
                heapq.heappush(heap, item)
            elif item[0] > heap[0][0]:
                heapq.heapreplace(heap, item)
            if len(heap) == count:
                floor[latent] = heap[0][0]
        progress(stop, total)
    examples = {
        latent: [
            Example(-place, tuple(source.tokens[-place].tolist()), values)
            for _, place, values in sorted(heap, reverse=True)
        ]
        for latent, heap in heaps.items()
    }
    return Survey(total * length, active / (total * length), peak, examples)


@dataclass(frozen=True)
class Activity:
    """What some latents did on a text.

    Attributes:
        latents: `[m]`, their numbers.
        histogram: `[m, bins]`, int64, tokens by activation, in equal bins from 0 to each latent's peak;
            tokens on which it is not active are in none.
        mean: `[m]`, mean activation where active; 0 for those never active.
        neighbors: `[m, most]`, the numbers of the latents most often active on the same tokens, among `m`.
        likeness: `[m, most]`, tokens on which both are active over the geometric mean of those of each.
    """

    latents: np.ndarray
    histogram: np.ndarray
    mean: np.ndarray
    neighbors: np.ndarray
    likeness: np.ndarray


def activity(
    sae: SAE,
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
        sae: reads the first of the source's sites.
        source: the activations.
        latents: `[m]`, those to look at.
        peak: `[n_latents]`, the largest activation of each on this text (`Survey.peak`).
        bins: of a histogram.
        most: neighbors per latent, fewer where there are not so many latents.
        contexts: use so many of the text's; all by default.
        progress: is told contexts done and contexts in all.

    Raises:
        SAEError: the SAE does not fit the site.
    """
    check_reads(sae, source)
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
        counts, sums, both = _count(sae, jnp.asarray(filled), real, chosen, scale, bins=bins)
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
        neighbors=np.asarray(latents)[order],
        likeness=np.take_along_axis(alike, order, axis=1),
    )


@partial(jax.jit, static_argnames="bins")
def _count(
    sae: SAE, x: Array, real: Array, latents: Array, scale: Array, *, bins: int
) -> tuple[Array, Array, Array]:
    codes = jnp.where(real[:, None], sae.encode(x)[:, latents], 0)
    active = codes > 0
    place = jnp.clip(jnp.floor(codes / scale[None] * bins).astype(jnp.int32), 0, bins - 1)
    counts = [((place == b) & active).sum(axis=0, dtype=jnp.int32) for b in range(bins)]
    on = active.astype(jnp.float32)
    return jnp.stack(counts, axis=1), codes.sum(axis=0), on.T @ on
