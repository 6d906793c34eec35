"""Merged tensors that are made when they are read: blocks on demand, of which the latest are held."""

from __future__ import annotations

import bisect
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np

from mergelab.checkpoints.file_tensor import check_piece
from mergelab.merging.engine.blocks import Buffers, TensorBlock
from mergelab.merging.engine.job import Job
from mergelab.merging.engine.pool import (
    Admission,
    BlockThreads,
    check_jobs,
    copied,
    default_threads,
    limits_for,
    looks_at_tree,
    measure_tree,
)
from mergelab.merging.engine.tensor_run import Limits, TensorRun

__all__ = ["MergedTensor", "merged_tensors"]

_MEASURED_ALONE = Limits(cache=0, keys=0)
"""What each tensor may hold where all are measured together: nothing, since they are as many as there are."""

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class MergedTensor:
    """A `TensorSource` whose elements are merged when they are read, to the bits that a run would write.

    Attributes:
        job: what is made.
    """

    job: Job
    _engine: _OnDemand

    @property
    def name(self) -> str:
        return self.job.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.job.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.job.dtype

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fills `out` with flat elements `[start, start + out.size)`.

        Raises:
            CheckpointError: an input cannot be read (`NonFiniteError`: holds NaN or infinity).
            OperatorError: the merge has no meaningful result for this tensor.
        """
        check_piece(self, self.job.size, start, out)
        self._engine.read(self.job, start, out)


def merged_tensors(
    jobs: Sequence[Job],
    *,
    seed: int = 0,
    memory: int = 10**9,
    threads: int | None = None,
    allow_nonfinite: bool = False,
) -> Mapping[str, MergedTensor]:
    """The tensors of a plan as sources; none is made before it is read.

    Read each from its beginning to its end, a few tensors at a time: what was read is soon forgotten, and
    made once more where it is asked for again.

    Args:
        jobs: what to make.
        seed: seed of every random draw.
        memory: bytes of tensors held at once. A tensor that cannot be cut into blocks, and takes more by
            itself, is worked on alone.
        threads: threads that measure a tensor; one per core if None.
        allow_nonfinite: whether NaN and infinity are merged instead of refused.

    Raises:
        OperatorError: a merge is given other numbers of models or values than it takes.
    """
    check_jobs(jobs)
    engine = _OnDemand(jobs, seed, memory, threads or default_threads(), check=not allow_nonfinite)
    return {job.name: MergedTensor(job, engine) for job in jobs}


class _Latest(Generic[T]):
    """Things that several threads ask for: each is made once, and the latest are held.

    Args:
        room: sum of sizes that is held, beside the latest thing.
    """

    def __init__(self, room: int) -> None:
        self._room, self._lock = room, threading.Lock()
        self._held: OrderedDict[Hashable, tuple[int, Future[T]]] = OrderedDict()

    def get(self, key: Hashable, size: int, make: Callable[[], T]) -> T:
        """The thing of this key, which one thread makes while the others wait."""
        with self._lock:
            known = self._held.get(key)
            if known is None:
                future: Future[T] = Future()
                self._held[key] = size, future
                self._forget()
            else:
                future = known[1]
            self._held.move_to_end(key)
        if known is None:
            try:
                future.set_result(make())
            except BaseException as error:
                with self._lock:
                    self._held.pop(key, None)
                future.set_exception(error)
        return future.result()

    def _forget(self) -> None:
        """Drops the oldest things that are done, as far as they are too many."""
        total = sum(size for size, _ in self._held.values())
        for key, (size, future) in list(self._held.items())[:-1]:
            if total <= self._room:
                return
            if future.done():
                del self._held[key]
                total -= size


class _OnDemand:
    """Jobs under way: those that are being read, with their measures, and the latest blocks."""

    def __init__(self, jobs: Sequence[Job], seed: int, memory: int, threads: int, *, check: bool) -> None:
        self._jobs, self._seed, self._check = tuple(jobs), seed, check
        self._limits, self._admission = limits_for(memory, threads), Admission(memory, threads)
        self._buffers, self._workers = Buffers(), BlockThreads(threads)
        self._runs: _Latest[TensorRun] = _Latest(threads)
        self._merged: _Latest[np.ndarray] = _Latest(memory // 4)
        self._tree_lock = threading.Lock()

    def read(self, job: Job, start: int, out: np.ndarray) -> None:
        """Fills `out` with elements of a job's tensor."""
        if not out.size:
            return
        if job.merge is None:
            out[:] = copied(job, start, out.size)
            return
        run = self._run(job)
        stop = start + out.size
        first = bisect.bisect_right([block.start for block in run.blocks], start) - 1
        for block in run.blocks[first:]:
            if block.start >= stop:
                break
            flat = self._block(run, block)
            begin, end = max(start, block.start), min(stop, block.start + block.count)
            out[begin - start : end - start] = flat[begin - block.start : end - block.start]

    def _block(self, run: TensorRun, block: TensorBlock) -> np.ndarray:
        def make() -> np.ndarray:
            with self._admission.admitted(run.job):
                return run.read(block)

        return self._merged.get((run.job.name, block.start), block.count * run.job.dtype.itemsize, make)

    def _run(self, job: Job) -> TensorRun:
        """A job with all its measures taken."""
        assert job.merge is not None
        if looks_at_tree(job.merge):
            with self._tree_lock:
                return self._tree[job.name]

        def make() -> TensorRun:
            with self._admission.admitted(job):
                run = self._begun(job, self._limits)
                for step in run.merge.steps():
                    run.take(*step)
                run.check()
                return run

        return self._runs.get(job.name, 1, make)

    @cached_property
    def _tree(self) -> Mapping[str, TensorRun]:
        """The jobs that are measured together."""
        pooled = [job for job in self._jobs if job.merge is not None and job.size]
        pooled = [job for job in pooled if looks_at_tree(job.merge)]
        runs = [self._begun(job, _MEASURED_ALONE) for job in pooled]
        measure_tree(runs)
        for run in runs:
            run.check()
        return {run.job.name: run for run in runs}

    def _begun(self, job: Job, limits: Limits) -> TensorRun:
        return TensorRun(
            job,
            seed=self._seed,
            limits=limits,
            buffers=self._buffers,
            map_blocks=self._workers.map,
            check=self._check,
        )
