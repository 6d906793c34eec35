"""Tensors of several models read once, side by side, by several threads in bounded memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from itertools import islice
from operator import add

import numpy as np

from mergelab.merging.diff.block_sums import PIECE, Summing, Sums, computing_dtype, with_changes
from mergelab.merging.diff.pairs import MatchedTensor
from mergelab.merging.diff.samples import sample_models
from mergelab.platform import usable_cores

__all__ = ["SAMPLE", "Gathered", "gather"]

SAMPLE = 1 << 16
"""Values of each tensor from which histograms and sign conflicts are taken."""

_BLOCK = 1 << 18
"""Entries read at a time. A constant: sums do not depend on threads or memory."""

_PART = 1 << 25
"""Entries that one thread works through before it takes the next."""


@dataclass(frozen=True)
class Gathered:
    """What was found of one tensor.

    Attributes:
        tensor: Tensor of every model.
        sums: Sums over its entries, all of them or those of the sample.
        sample: `[vectors, n]`, vectors of a sample as those of `sums`.
    """

    tensor: MatchedTensor
    sums: Sums
    sample: np.ndarray


def gather(
    tensors: Sequence[MatchedTensor],
    reference: int,
    *,
    pair: bool = False,
    full: bool = True,
    sample: int = SAMPLE,
    threads: int | None = None,
    progress: Callable[[int], object] = lambda nbytes: None,
) -> Iterator[Gathered]:
    """Sums and a sample of each tensor, in order.

    Args:
        tensors: Tensors that the models have in common.
        reference: Index of the model that changes are taken from.
        pair: Whether the difference of the first two models is summed too.
        full: Whether every entry is read, or the sample alone.
        sample: Values that are taken of each tensor.
        threads: Threads that read and add; as many as there are cores if None.
        progress: Function called with the number of bytes just read, of all models together.

    Raises:
        CheckpointError: a tensor cannot be read.
    """
    workers = threads or usable_cores()
    local = threading.local()

    def summed(tensor: MatchedTensor, start: int, stop: int) -> Sums:
        sums = _sum_part(tensor, start, stop, reference, pair, local)
        progress((stop - start) * sum(source.dtype.itemsize for source in tensor.sources))
        return sums

    def sampled(tensor: MatchedTensor) -> tuple[np.ndarray, Sums | None]:
        values = sample_models(tensor, sample)
        with np.errstate(all="ignore"):
            vectors = with_changes(values, reference, pair=pair)
        return vectors, None if full else _sum_values(values, reference, pair)

    with ThreadPoolExecutor(workers) as pool:

        def begin(tensor: MatchedTensor) -> tuple[MatchedTensor, Future, list[Future]]:
            parts = [pool.submit(summed, tensor, *span) for span in _parts(tensor)] if full else []
            return tensor, pool.submit(sampled, tensor), parts

        waiting = iter(tensors)
        running = [begin(tensor) for tensor in islice(waiting, 4 * workers)]
        try:
            while running:
                tensor, drawn, parts = running.pop(0)
                vectors, sums = drawn.result()
                if full:
                    sums = reduce(add, (part.result() for part in parts), _nothing(tensor, pair))
                running += [begin(tensor) for tensor in islice(waiting, 1)]
                assert sums is not None
                yield Gathered(tensor, sums, vectors)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _parts(tensor: MatchedTensor) -> list[tuple[int, int]]:
    """The spans of a tensor that one thread takes at a time; whole rows where these belong to tokens."""
    step = _PART
    if tensor.has_tokens:
        width = max(1, tensor.shape[1])
        step = max(1, _PART // width) * width
    return [(start, min(start + step, tensor.size)) for start in range(0, tensor.size, step)]


def _width(tensor: MatchedTensor) -> int:
    return tensor.shape[1] if tensor.has_tokens else 0


def _nothing(tensor: MatchedTensor, pair: bool) -> Sums:
    """The sums over no entries."""
    models = len(tensor.sources)
    vectors = models + pair
    zeros = np.zeros(vectors, np.int64)
    return Sums(
        0, np.zeros((vectors, vectors)), zeros, zeros, np.zeros(models, np.int64), np.zeros((vectors, 0))
    )


def _sum_part(
    tensor: MatchedTensor, start: int, stop: int, reference: int, pair: bool, local: threading.local
) -> Sums:
    width = _width(tensor)
    dtype = computing_dtype([source.dtype for source in tensor.sources])
    block, piece = _BLOCK, PIECE
    if width:
        block, piece = (max(1, size // width) * width for size in (_BLOCK, PIECE))
    summing = _scratch(local, tensor, reference, pair, dtype, piece)
    summing.begin()
    for first in range(start, stop, block):
        count = min(block, stop - first)
        values = [_buffer(local, i, source.dtype, block)[:count] for i, source in enumerate(tensor.sources)]
        for source, out in zip(tensor.sources, values, strict=True):
            source.read_into(first, out)
        for at in range(0, count, piece):
            summing.add([value[at : at + piece] for value in values], width)
    return summing.sums()


def _scratch(
    local: threading.local, tensor: MatchedTensor, reference: int, pair: bool, dtype: np.dtype, piece: int
) -> Summing:
    """The calling thread's own."""
    kept = local.__dict__.setdefault("summing", {})
    key = (len(tensor.sources), reference, pair, dtype, max(piece, PIECE))
    if key not in kept:
        kept[key] = Summing(len(tensor.sources), reference, pair=pair, dtype=dtype, piece=max(piece, PIECE))
    return kept[key]


def _buffer(local: threading.local, place: int, dtype: np.dtype, count: int) -> np.ndarray:
    """Memory of the calling thread to read into: pages that were touched before fill faster."""
    kept = local.__dict__.setdefault("buffers", {})
    found = kept.get((place, dtype))
    if found is None or found.size < count:
        found = kept[place, dtype] = np.empty(count, dtype)
    return found


def _sum_values(values: np.ndarray, reference: int, pair: bool) -> Sums:
    """The sums over a sample; rows of tokens are not told apart."""
    size = max(1, values.shape[1])
    summing = Summing(len(values), reference, pair=pair, dtype=values.dtype, piece=size)
    summing.add(list(values))
    return summing.sums()
