"""One tensor on its way through a merge: a pass over its blocks per measure, then one that writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import ml_dtypes
import numpy as np

from mergelab.compat import enable_x64
from mergelab.errors import CheckpointError
from mergelab.merging.engine.blocks import (
    Buffers,
    InputBlock,
    TensorBlock,
    blocks_of,
    has_nonfinite,
    nonfinite_error,
    read_block,
)
from mergelab.merging.engine.job import Job
from mergelab.merging.engine.order_search import KeySearch
from mergelab.operators.algebra import finish_measure, measure_block, merge_block
from mergelab.operators.measures import Measure, PerBlock, Rank, RowOrder, Sum, pack_masks_on_host
from mergelab.operators.order_statistics import Selection, above_place_on_host, split_words, trivial_selection
from mergelab.operators.region import Region, tensor_key

__all__ = ["Limits", "TensorRun", "WriteBlock"]

T = TypeVar("T")
WriteBlock = Callable[[str, int, np.ndarray], None]
BlockMap = Callable[[Callable[[TensorBlock], T], Sequence[TensorBlock]], Iterator[T]]

_PER_BLOCK = object()
_DEVICE_DTYPES = tuple(
    np.dtype(t)
    for t in (np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
)
_SAMPLE_RUNS, _SAMPLE_SHAPE = 48, (4, 1024)


@dataclass(frozen=True)
class Limits:
    """How much of a tensor may be held in memory at once, in bytes.

    Attributes:
        cache: inputs kept between passes instead of being read again.
        keys: sort keys kept between the passes of a search, and masks kept between passes over a tensor,
            instead of being computed again.
    """

    cache: int
    keys: int


class TensorRun:
    """Runs one job; `map_blocks` decides how many blocks are worked on at a time."""

    def __init__(
        self, job: Job, *, seed: int, limits: Limits, buffers: Buffers, map_blocks: BlockMap[Any], check: bool
    ) -> None:
        assert job.formula is not None
        self.job, self.merge = job, job.formula
        self._entire = self.merge.grain == "tensor"
        # Buffers of whole tensors are too large to be kept for others.
        self._buffers = Buffers() if self._entire else buffers
        self._limits, self._map, self._check = limits, map_blocks, check
        self._key = tensor_key(seed, job.name)
        self.blocks = blocks_of(job.shape, self.merge.grain)
        self.known: list[list[Any]] = [[] for _ in self.merge.parts]
        self._passes = 1 + sum(not isinstance(m, RowOrder | PerBlock) for _, _, m in self.merge.steps())
        self._cache: dict[TensorBlock, InputBlock] | None = (
            {} if self._passes > 1 and job.bytes_in <= limits.cache else None
        )
        self._block_results: dict[tuple[TensorBlock, int, int], Any] = {}
        self._kept_bytes = 0

    # --- blocks ---------------------------------------------------------------------------------------

    @contextmanager
    def _inputs(self, block: TensorBlock) -> Iterator[InputBlock]:
        """The inputs of a block: cached, or read now and handed back afterwards."""
        if self._cache is not None and block in self._cache:
            yield self._cache[block]
            return
        inputs = read_block(self.job, block, self._buffers, check=self._check and not self.merge.transparent)
        if self._cache is not None:
            self._cache[block] = inputs
            yield inputs
            return
        yield inputs
        for buffer in inputs.buffers:
            self._buffers.give_back(buffer)

    def _region(self, block: TensorBlock, inputs: InputBlock) -> Region:
        count = np.uint32(block.count)
        start, short = split_words(block.start), not self._entire
        return Region(
            start, self._key, block.shape, "float64", short=short, count=count, statistics=inputs.statistics
        )

    def _known(self, inputs: InputBlock, block: TensorBlock) -> tuple[tuple[Any, ...], ...]:
        """What is known so far, with the results that belong to this block filled in."""
        resolved: list[list[Any]] = [[] for _ in self.known]
        for part, results in enumerate(self.known):
            for measure, result in enumerate(results):
                if result is _PER_BLOCK:
                    result = self._of_block(inputs, block, resolved, part, measure)
                resolved[part].append(result)
        return tuple(map(tuple, resolved))

    def _of_block(
        self, inputs: InputBlock, block: TensorBlock, known: list[list[Any]], part: int, measure: int
    ) -> Any:
        """A result that belongs to one block: kept while there is room, else computed wherever it is used."""
        place = (block, part, measure)
        if place in self._block_results:
            return self._block_results[place]
        result = measure_block(
            self.merge,
            inputs.values,
            inputs.base,
            self._region(block, inputs),
            tuple(map(tuple, known)),
            part=part,
            measure=measure,
        )
        if isinstance(self.merge.parts[part].measures()[measure], RowOrder):
            result = pack_masks_on_host([above_place_on_host(question) for question in result])
        if self._passes > 1:
            size = sum(array.nbytes for array in jax.tree.leaves(result))
            if self._kept_bytes + size <= self._limits.keys:
                self._kept_bytes += size
                self._block_results[place] = result
        return result

    def _measure(self, block: TensorBlock, part: int, measure: int) -> Any:
        """One measure of one block, as numpy arrays."""
        with self._inputs(block) as inputs:
            known = self._known(inputs, block)
            wide = isinstance(self.merge.parts[part].measures()[measure], Sum)
            with enable_x64(wide):
                result = measure_block(
                    self.merge,
                    inputs.values,
                    inputs.base,
                    self._region(block, inputs),
                    known,
                    part=part,
                    measure=measure,
                )
                return jax.tree.map(np.asarray, result)

    # --- measures -------------------------------------------------------------------------------------

    def take(self, part: int, measure: int, declared: Measure) -> None:
        """Takes one measure of the whole tensor."""
        if isinstance(declared, RowOrder | PerBlock):
            self.known[part].append(_PER_BLOCK)
        elif isinstance(declared, Sum):
            known = tuple(self.known[part])
            if declared.needed is not None and not declared.needed(self.merge.parts[part], known):
                self.known[part].append(None)
                return
            self.finish_sum(part, measure, self.total(part, measure))
        else:
            self.known[part].append(self._rank(part, measure, declared))

    def total(self, part: int, measure: int) -> Any:
        """A `Sum`'s totals, added in block order."""
        total: Any = None
        for one in self._map(lambda block: self._measure(block, part, measure), self.blocks):
            total = one if total is None else jax.tree.map(np.add, total, one)
        return total

    def finish_sum(self, part: int, measure: int, total: Any) -> None:
        """Files what a part makes of a `Sum`'s totals."""
        with enable_x64(True):
            finished = finish_measure(self.merge, total, part=part, measure=measure)
            self.known[part].append(jax.tree.map(np.asarray, finished))

    def counts(self, part: int, declared: Rank, size: int) -> Sequence[Sequence[int]]:
        """How many keys each threshold of a `Rank` keeps."""
        return declared.counts(self.merge.parts[part], tuple(self.known[part]), size, len(self.job.sources))

    def keys(self, block: TensorBlock, part: int, measure: int) -> list[np.ndarray]:
        """Sort keys of a block's real elements, one flat array per stream."""
        return [k.reshape(-1)[: block.count] for k in self._measure(block, part, measure)]

    def _rank(self, part: int, measure: int, declared: Rank) -> tuple[tuple[Selection, ...], ...]:
        counts = self.counts(part, declared, self.job.size)
        fixed = [
            [trivial_selection(c, self.job.size, values=declared.values) for c in stream] for stream in counts
        ]
        searches = {
            (s, r): KeySearch(counts[s][r], self.job.size)
            for s, stream in enumerate(fixed)
            for r, selection in enumerate(stream)
            if selection is None
        }
        if searches:
            self._search(searches, part, measure)
        return tuple(
            tuple(searches[s, r].selection() if sel is None else sel for r, sel in enumerate(stream))
            for s, stream in enumerate(fixed)
        )

    def _search(self, searches: dict[tuple[int, int], KeySearch], part: int, measure: int) -> None:
        streams = sorted({s for s, _ in searches})
        kept: dict[TensorBlock, list[np.ndarray]] | None = None
        if self.job.size * 4 * len(streams) <= self._limits.keys:
            kept = dict(
                zip(self.blocks, self._map(lambda b: self.keys(b, part, measure), self.blocks), strict=True)
            )

        def keys_of(block: TensorBlock) -> list[np.ndarray]:
            return self.keys(block, part, measure) if kept is None else kept[block]

        sample = self._sample(part, measure) if kept is None else _strided(list(kept.values()), self.job.size)
        for (stream, _), search in searches.items():
            search.narrow(sample[stream], independent=kept is not None)
        pending = dict(searches)
        while pending:

            def look(block: TensorBlock, pending: dict[tuple[int, int], KeySearch] = pending) -> Any:
                keys = keys_of(block)
                return {place: search.look(keys[place[0]]) for place, search in pending.items()}

            found = list(self._map(look, self.blocks))
            pending = {p: s for p, s in pending.items() if not s.conclude([f[p] for f in found])}
        for (stream, _), search in searches.items():
            position = search.tie_block()
            if position is not None:
                block = self.blocks[position]
                search.place_tie(position, keys_of(block)[stream], block.start)

    def _sample(self, part: int, measure: int) -> list[np.ndarray]:
        """Keys of short runs spread evenly over the tensor."""
        run = math.prod(_SAMPLE_SHAPE)
        if self.merge.grain != "element" or self.job.size < run * _SAMPLE_RUNS:
            chosen = self.blocks[:: max(1, len(self.blocks) // 4)]
        else:
            step = max(1, self.job.size // run // _SAMPLE_RUNS)
            starts = range(0, self.job.size - run + 1, step * run)
            chosen = tuple(TensorBlock(start, run, _SAMPLE_SHAPE) for start in starts)
        uncached = self._map(lambda b: self.keys(b, part, measure), chosen)
        return [np.concatenate(stream) for stream in zip(*uncached, strict=True)]

    # --- output ---------------------------------------------------------------------------------------

    def check(self) -> None:
        """Checks, all measures taken, that the merge has a result.

        Raises:
            OperatorError: the measures leave some part of the merge without a meaningful result.
        """
        for part, known in zip(self.merge.parts, self.known, strict=True):
            if not any(result is _PER_BLOCK for result in known):
                part.check(tuple(known), self.job.name)

    def write(self, write: WriteBlock) -> None:
        """Merges and writes every block.

        Raises:
            OperatorError: the measures leave some part of the merge without a meaningful result.
        """
        self.check()
        for _ in self._map(lambda block: self._write_block(block, write), self.blocks):
            pass
        if self._cache is not None:
            for inputs in self._cache.values():
                for buffer in inputs.buffers:
                    self._buffers.give_back(buffer)
            self._cache = {}
        self._block_results = {}

    def read(self, block: TensorBlock) -> np.ndarray:
        """One merged block, flat and of the job's dtype, in memory of its own; all measures are taken."""
        found: list[np.ndarray] = []
        # What is computed may share memory with the inputs, which others fill again.
        self._write_block(block, lambda name, start, flat: found.append(flat.copy()))
        return found[0]

    def _write_block(self, block: TensorBlock, write: WriteBlock) -> None:
        dtype = self.job.dtype if self.job.dtype in _DEVICE_DTYPES else np.dtype(np.float32)
        with self._inputs(block) as inputs:
            known = self._known(inputs, block)
            with enable_x64(self._entire):
                out = merge_block(
                    self.merge, inputs.values, inputs.base, self._region(block, inputs), known, dtype=dtype
                )
            flat = np.asarray(out).reshape(-1)[: block.count]
            if self._check and has_nonfinite(flat):
                raise nonfinite_error(self.job)
            write(
                self.job.name,
                block.start,
                flat if flat.dtype == self.job.dtype else _host_cast(flat, self.job),
            )


def _strided(blocks: list[list[np.ndarray]], size: int) -> list[np.ndarray]:
    """A subset of all keys of every stream: up to 2^17 of them, few enough to sort beside the rest.

    A wider sample narrows the bracket, and to collect a key costs ten times what it costs to count it.
    """
    step = max(16, size >> 17) if size >= 2**18 else max(1, size >> 14)
    return [np.concatenate([keys[::step] for keys in stream]) for stream in zip(*blocks, strict=True)]


def _host_cast(flat: np.ndarray, job: Job) -> np.ndarray:
    """Casts to dtypes that the device does not have, such as float64 and int64."""
    if np.issubdtype(job.dtype, np.integer) and not np.isfinite(flat).all():
        raise CheckpointError(f"tensor {job.name!r} is not finite, so it cannot be written as {job.dtype}.")
    return flat.astype(job.dtype)
