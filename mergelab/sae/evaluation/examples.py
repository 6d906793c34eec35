"""The places in a text at which latents are most active: what a person looks at to name a feature."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from mergelab.activations.capture import ModelActivations
from mergelab.errors import SAEError
from mergelab.sae.dictionary import Dictionary
from mergelab.sae.evaluation.passes import encode

__all__ = ["Example", "Survey", "survey"]


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
    dictionary: Dictionary,
    source: ModelActivations,
    *,
    count: int = 5,
    latents: Sequence[int] | None = None,
    contexts: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Survey:
    """Runs a dictionary over a text once, keeping each latent's strongest contexts.

    Args:
        dictionary: reads the first of the source's sites.
        source: the activations.
        count: contexts kept per latent; of equal ones the first.
        latents: those to keep examples of; all by default.
        contexts: use so many of the text's; all by default.
        progress: is told contexts done and contexts in all.

    Raises:
        SAEError: the dictionary reads activations of another width.
    """
    if source.widths[0] != dictionary.d_in:
        raise SAEError(
            f"the dictionary reads activations {dictionary.d_in} wide, but site {source.sites[0]!r} gives "
            f"{source.widths[0]}; take the site it was trained on."
        )
    total, length = source.tokens.shape
    total = min(total, contexts or total)
    active = np.zeros(dictionary.n_latents, np.int64)
    peak = np.zeros(dictionary.n_latents, np.float32)
    wanted = range(dictionary.n_latents) if latents is None else latents
    heaps: dict[int, list[tuple[float, int, tuple[float, ...]]]] = {int(latent): [] for latent in wanted}
    # What a latent's peak in a context must exceed to be kept; nothing does for those not asked for.
    floor = np.full(dictionary.n_latents, np.inf, np.float32)
    floor[list(heaps)] = 0
    for start in range(0, total, source.batch):
        stop = min(start + source.batch, total)
        rows = source.read_sites(start * length, stop * length)[0]
        filled = np.pad(rows, ((0, source.batch * length - len(rows)), (0, 0)))  # one shape, one program
        codes = np.asarray(encode(dictionary, jnp.asarray(filled)))[: len(rows)]
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
