"""Where, how often and how strongly latents are active, and with whom.

The model runs over the text once (`read_codes`), which gives pieces of sparse codes. Accumulators take them
one by one: `Strengths`, `StrongestContexts`, `Histograms`, `Companions`. What must wait for another (a
histogram for the latent's peak) takes them again from a `CodeStore`, without the model.
"""

from __future__ import annotations

import heapq
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mergelab.activations.model_activations import ModelActivations
from mergelab.sae.sae import SAE
from mergelab.sae.splice import encode_batches

__all__ = [
    "Activity",
    "CodeStore",
    "Companions",
    "Example",
    "Histograms",
    "StoredCodes",
    "Strengths",
    "StrongestContexts",
    "Survey",
    "activity",
    "read_codes",
    "survey",
]

_IN_MEMORY = 2**29  # bytes of sparse codes that are kept before a file takes them: 45 million codes


class StoredCodes(NamedTuple):
    """The codes above 0 of some whole contexts, in the order of rows, then of latents.

    Attributes:
        first: number of the first context among the source's.
        contexts: number of contexts.
        row: `[nonzeros]` int32, token within these contexts.
        latent: `[nonzeros]` int32.
        value: `[nonzeros]` float32.
        kept: number of tokens of these contexts that count; none of the others has a code here.
    """

    first: int
    contexts: int
    row: np.ndarray
    latent: np.ndarray
    value: np.ndarray
    kept: int

    def of(self, place: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows, places and values of the codes of some latents.

        Args:
            place: `[n_latents]`, the place of each latent among those wanted, -1 for the others.
        """
        at = place[self.latent]
        wanted = at >= 0
        return self.row[wanted], at[wanted], self.value[wanted]


def read_codes(
    sae: SAE,
    source: ModelActivations,
    contexts: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[StoredCodes]:
    """Runs model and SAE over a text once, a forward pass at a time; codes of the tokens that count.

    Args:
        sae: SAE that reads the first of the source's sites.
        source: the activations.
        contexts: number of contexts to read, from the start; all by default.
        progress: function of the contexts done and their total.

    Raises:
        SAEError: the SAE does not fit the site.
    """
    length = source.tokens.shape[1]
    total = min(len(source.tokens), contexts or len(source.tokens))
    for number, (codes, kept) in enumerate(encode_batches(sae, source, contexts)):
        first, here = number * source.batch, len(codes) // length
        row, latent = (place.astype(np.int32) for place in np.nonzero(codes > 0))
        yield StoredCodes(first, here, row, latent, codes[row, latent], int(kept.sum()))
        progress(first + here, total)


class CodeStore:
    """Pieces of codes to be read again, 12 bytes a code: in memory, and above half a gigabyte in a file."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115 - closed by __exit__
        self._pieces: list[tuple[int, int, int, int]] = []

    def __enter__(self) -> CodeStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, codes: StoredCodes) -> None:
        """Keeps a piece."""
        self._pieces.append((codes.first, codes.contexts, len(codes.row), codes.kept))
        for array in (codes.row, codes.latent, codes.value):
            self._file.write(array.tobytes())

    def __iter__(self) -> Iterator[StoredCodes]:
        self._file.seek(0)
        for first, contexts, count, kept in self._pieces:
            row, latent, value = (
                np.frombuffer(self._file.read(4 * count), kind) for kind in (np.int32, np.int32, np.float32)
            )
            yield StoredCodes(first, contexts, row, latent, value, kept)


class Strengths:
    """How often and how strongly every latent is active."""

    def __init__(self, n_latents: int) -> None:
        self._times = np.zeros(n_latents, np.int64)
        self.rows = 0
        self.peak = np.zeros(n_latents, np.float32)

    def add(self, codes: StoredCodes) -> None:
        """Takes a piece."""
        self.rows += codes.kept
        self._times += np.bincount(codes.latent, minlength=len(self._times))
        np.maximum.at(self.peak, codes.latent, codes.value)

    def density(self) -> np.ndarray:
        """`[n_latents]`, the fraction of the tokens that count on which each is active."""
        return self._times / max(self.rows, 1)


class StrongestContexts:
    """The contexts in which latents have their largest activations, exact; of equal ones the first."""

    def __init__(self, n_latents: int, latents: Sequence[int], count: int, tokens: np.ndarray) -> None:
        """Starts with none.

        Args:
            n_latents: number of latents of the SAE.
            latents: `[m]`, those that contexts are kept of.
            count: number of contexts per latent.
            tokens: `[contexts, length]`, the text.
        """
        self._place = _places(n_latents, latents)
        self._latents = [int(latent) for latent in latents]
        self._count, self._tokens = count, tokens
        self._heaps: list[list[tuple[float, int, np.ndarray, np.ndarray]]] = [[] for _ in self._latents]
        # What a latent's peak in a context must exceed to be kept.
        self._floor = np.zeros(len(self._latents), np.float32)

    def add(self, codes: StoredCodes) -> None:
        """Takes a piece."""
        row, at, value = codes.of(self._place)
        if not len(row):
            return
        context, offset = np.divmod(row, self._tokens.shape[1])
        # Codes of one latent in one context side by side, in the order of tokens.
        order = np.lexsort((at, context))
        context, offset, at, value = context[order], offset[order], at[order], value[order]
        new = (np.diff(context) != 0) | (np.diff(at) != 0)
        starts = np.concatenate([[0], np.flatnonzero(new) + 1])
        stops = np.append(starts[1:], len(at))
        peaks = np.maximum.reduceat(value, starts)
        for i in np.flatnonzero(peaks > self._floor[at[starts]]).tolist():
            place, part = int(at[starts[i]]), slice(starts[i], stops[i])
            heap, peak = self._heaps[place], float(peaks[i])
            number = codes.first + int(context[starts[i]])
            item = (peak, -number, offset[part], value[part])
            if len(heap) < self._count:
                heapq.heappush(heap, item)
            elif peak > heap[0][0]:
                heapq.heapreplace(heap, item)
            if len(heap) == self._count:
                self._floor[place] = heap[0][0]

    def examples(self) -> dict[int, list[Example]]:
        """The contexts of each latent, the largest activation first."""
        return {
            latent: [
                self._example(*item[1:]) for item in sorted(heap, key=lambda item: item[:2], reverse=True)
            ]
            for latent, heap in zip(self._latents, self._heaps, strict=True)
        }

    def _example(self, number: int, offset: np.ndarray, value: np.ndarray) -> Example:
        codes = np.zeros(self._tokens.shape[1], np.float32)
        codes[offset] = value
        return Example(-number, tuple(self._tokens[-number].tolist()), tuple(codes.tolist()))


class Histograms:
    """Tokens by activation, in equal bins from 0 to each latent's peak, and mean activations."""

    def __init__(self, latents: np.ndarray, peak: np.ndarray, bins: int) -> None:
        """Starts with none.

        Args:
            latents: `[m]`, those to look at.
            peak: `[n_latents]`, the largest activation of each.
            bins: bins of a histogram.
        """
        self._place = _places(len(peak), latents)
        self._scale = np.where(peak[latents] > 0, peak[latents], 1).astype(np.float32)
        self._sum = np.zeros(len(latents))
        self.counts = np.zeros((len(latents), bins), np.int64)

    def add(self, codes: StoredCodes) -> None:
        """Takes a piece."""
        _, at, value = codes.of(self._place)
        m, bins = self.counts.shape
        place = np.floor(value / self._scale[at] * np.float32(bins)).astype(np.int64)
        place = at.astype(np.int64) * bins + np.clip(place, 0, bins - 1)
        self.counts += np.bincount(place, minlength=m * bins).reshape(m, bins)
        self._sum += np.bincount(at, weights=value, minlength=m)

    def mean(self) -> np.ndarray:
        """`[m]`, mean activation where active; 0 for those never active."""
        return self._sum / np.maximum(self.counts.sum(axis=1), 1)


class Companions:
    """Which latents are active on the same tokens; memory is `8 m^2` bytes."""

    def __init__(self, n_latents: int, latents: np.ndarray, length: int) -> None:
        """Starts with none.

        Args:
            n_latents: number of latents of the SAE.
            latents: `[m]`, those that are compared.
            length: tokens in a context.
        """
        self._latents, self._length = np.asarray(latents), length
        self._place = _places(n_latents, latents)
        self._together = np.zeros((len(latents), len(latents)))

    def add(self, codes: StoredCodes) -> None:
        """Takes a piece."""
        from scipy.sparse import csr_array

        row, at, _ = codes.of(self._place)
        shape = (codes.contexts * self._length, len(self._latents))
        on = csr_array((np.ones(len(row)), (row, at)), shape)
        both = (on.T @ on).tocoo()
        self._together[both.row, both.col] += both.data

    def neighbors(self, most: int) -> tuple[np.ndarray, np.ndarray]:
        """The latents most often active on the same tokens, and how often: both `[m, most]`.

        The second is the tokens on which both are active over the geometric mean of those of each.
        """
        norm = np.sqrt(np.maximum(np.diag(self._together), 1))
        alike = self._together / norm[:, None] / norm[None, :]
        np.fill_diagonal(alike, -1)
        order = np.argsort(-alike, axis=1, kind="stable")[:, : min(most, len(self._latents) - 1)]
        return self._latents[order], np.take_along_axis(alike, order, axis=1)


def _places(n_latents: int, latents: Sequence[int] | np.ndarray) -> np.ndarray:
    """`[n_latents]`, the place of each latent among those wanted, -1 for the others."""
    place = np.full(n_latents, -1, np.int32)
    place[np.asarray(latents, np.int64)] = np.arange(len(latents))
    return place


@dataclass(frozen=True)
class Example:
    """One context in which a latent is active.

    Attributes:
        context: number of the context among the source's.
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
        rows: tokens seen that count.
        density: `[n_latents]`, fraction of the tokens each latent is active on.
        peak: `[n_latents]`, the largest activation of each.
        examples: contexts by latent with the largest activations, the largest first; exact.
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
    latents: Sequence[int] | Callable[[np.ndarray], Sequence[int]] | None = None,
    contexts: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Survey:
    """Runs an SAE over a text once, keeping each latent's strongest contexts.

    Args:
        sae: SAE that reads the first of the source's sites.
        source: the activations.
        count: contexts kept per latent; of equal ones the first.
        latents: those to keep examples of, or a function that chooses them by the densities `[n_latents]`;
            all by default.
        contexts: number of contexts to read, from the start; all by default.
        progress: function of the contexts done and their total.

    Raises:
        SAEError: the SAE does not fit the site.
    """
    strengths = Strengths(sae.n_latents)
    pieces = read_codes(sae, source, contexts, progress)
    if callable(latents):
        with CodeStore() as store:
            for codes in pieces:
                strengths.add(codes)
                store.add(codes)
            wanted = latents(strengths.density())
            strongest = StrongestContexts(sae.n_latents, wanted, count, source.tokens)
            for codes in store:
                strongest.add(codes)
    else:
        wanted = range(sae.n_latents) if latents is None else latents
        strongest = StrongestContexts(sae.n_latents, wanted, count, source.tokens)
        for codes in pieces:
            strengths.add(codes)
            strongest.add(codes)
    return Survey(strengths.rows, strengths.density(), strengths.peak, strongest.examples())


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
    codes: Iterable[StoredCodes],
    latents: np.ndarray,
    peak: np.ndarray,
    length: int,
    *,
    bins: int = 20,
    most: int = 6,
) -> Activity:
    """Histograms and neighbors of latents, from codes that are read (`read_codes`) or kept (`CodeStore`).

    Args:
        codes: those of a text.
        latents: `[m]`, those to look at.
        peak: `[n_latents]`, the largest activation of each on this text (`Survey.peak`).
        length: tokens in a context.
        bins: bins of a histogram.
        most: neighbors per latent, fewer where there are fewer latents.
    """
    histograms, companions = Histograms(latents, peak, bins), Companions(len(peak), latents, length)
    for piece in codes:
        histograms.add(piece)
        companions.add(piece)
    neighbors, likeness = companions.neighbors(most)
    return Activity(np.asarray(latents), histograms.counts, histograms.mean(), neighbors, likeness)
