"""Merges whose measures look at all tensors together: every tensor takes each step before the next begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mergelab.errors import OperatorError
from mergelab.merging.streaming.search import KeySearch
from mergelab.merging.streaming.tensor_run import TensorRun, WriteBlock
from mergelab.operators.measures import Rank, Sum
from mergelab.operators.order_statistics import Selection, split_words, trivial_selection

__all__ = ["run_tree"]


def run_tree(runs: Sequence[TensorRun], write: WriteBlock) -> None:
    """Runs jobs in lockstep; tensors are ranked together in name order, as in memory.

    Raises:
        OperatorError: the jobs do not all use the same operator.
    """
    runs = sorted(runs, key=lambda run: run.job.name)
    shape = [[(p, m, type(d)) for p, m, d in run.merge.steps()] for run in runs]
    if any(steps != shape[0] for steps in shape):
        raise OperatorError(
            "an operator with scope 'tree' looks at all tensors together, so every tensor must use the same "
            "one; remove the differing slices or modules."
        )
    for part, measure, declared in runs[0].merge.steps():
        if getattr(declared, "scope", "tensor") != "tree":
            for run in runs:
                run.take(part, measure, run.merge.parts[part].measures()[measure])
        elif isinstance(declared, Sum):
            totals = [run.total(part, measure) for run in runs]
            pooled = jax.tree.map(lambda *each: sum(each[1:], each[0]), *totals)
            for run in runs:
                run.finish_sum(part, measure, pooled)
        elif isinstance(declared, Rank):
            _rank(runs, part, measure, declared)
    for run in runs:
        run.write(write)


def _rank(runs: Sequence[TensorRun], part: int, measure: int, declared: Rank) -> None:
    size = sum(run.job.size for run in runs)
    counts = runs[0].counts(part, declared, size)
    pooled = [
        [_select(runs, part, measure, s, count, size) for count in stream] for s, stream in enumerate(counts)
    ]
    offset = 0
    for run in runs:
        shared = tuple(tuple(_share(sel, offset, run.job.size) for sel in stream) for stream in pooled)
        run.known[part].append(shared)
        offset += run.job.size


def _select(
    runs: Sequence[TensorRun], part: int, measure: int, stream: int, count: int, size: int
) -> Selection:
    if (trivial := trivial_selection(count, size)) is not None:
        return trivial
    places = [(run, block) for run in runs for block in run.blocks]

    def keys(run: TensorRun, block: Any) -> np.ndarray:
        return run.keys(block, part, measure)[stream]

    search = KeySearch(count, size, limit=max(1024, 2**23 // len(places)))
    step = max(1, size >> 18)
    search.narrow(np.concatenate([keys(run, block)[::step] for run, block in places]))
    while not search.conclude([search.look(keys(run, block)) for run, block in places]):
        pass
    position = search.tie_block()
    if position is not None:
        run, block = places[position]
        before = sum(other.job.size for other in runs[: runs.index(run)])
        search.place_tie(position, keys(run, block), before + block.start)
    return search.selection()


def _share(pooled: Selection, offset: int, size: int) -> Selection:
    cutoff = (int(pooled.cutoff[0]) << 32) | int(pooled.cutoff[1])
    return Selection(pooled.threshold, split_words(min(max(cutoff - offset, 0), size)))
