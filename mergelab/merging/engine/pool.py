"""All jobs of a plan within a memory budget; merges of whole trees step by step."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import jax
import numpy as np

from mergelab.errors import CheckpointError, OperatorError
from mergelab.merging.engine.blocks import BLOCK_ELEMENTS, Buffers, TensorBlock
from mergelab.merging.engine.job import Job
from mergelab.merging.engine.order_search import KeySearch
from mergelab.merging.engine.tensor_run import Limits, TensorRun, WriteBlock
from mergelab.operators.measures import Rank, Sum
from mergelab.operators.order_statistics import Selection, split_words, trivial_selection
from mergelab.platform import usable_cores

__all__ = [
    "Admission",
    "BlockThreads",
    "StreamReport",
    "TensorWriter",
    "check_jobs",
    "copied",
    "default_threads",
    "limits_for",
    "looks_at_tree",
    "measure_tree",
    "run_tree",
    "stream_jobs",
]


def run_tree(runs: Sequence[TensorRun], write: WriteBlock) -> None:
    """Runs jobs in lockstep; tensors are ranked together in name order, as in memory.

    Raises:
        OperatorError: the jobs do not all use the same operator.
    """
    measure_tree(runs)
    for run in sorted(runs, key=lambda run: run.job.name):
        run.write(write)


def measure_tree(runs: Sequence[TensorRun]) -> None:
    """Takes the measures of jobs in lockstep; errors are those of `run_tree`."""
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


def _rank(runs: Sequence[TensorRun], part: int, measure: int, declared: Rank) -> None:
    size = sum(run.job.size for run in runs)
    counts = runs[0].counts(part, declared, size)
    pooled = [
        [_select(runs, part, measure, s, count, size, values=declared.values) for count in stream]
        for s, stream in enumerate(counts)
    ]
    offset = 0
    for run in runs:
        shared = tuple(tuple(_share(sel, offset, run.job.size) for sel in stream) for stream in pooled)
        run.known[part].append(shared)
        offset += run.job.size


def _select(
    runs: Sequence[TensorRun], part: int, measure: int, stream: int, count: int, size: int, *, values: bool
) -> Selection:
    if (trivial := trivial_selection(count, size, values=values)) is not None:
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


T = TypeVar("T")


class TensorWriter(Protocol):
    """What the runner needs of an output: pieces written at their place, from any thread."""

    @property
    def done(self) -> frozenset[str]:
        """Tensors that an interrupted run has already written in full."""
        ...

    def write(self, name: str, start: int, array: np.ndarray) -> None: ...


@dataclass(frozen=True)
class StreamReport:
    """What a streaming run did.

    Attributes:
        tensors: tensors written now.
        reused: tensors found complete from an interrupted run.
        bytes_in, bytes_out: size of the inputs read and of the tensors written, each counted once.
        seconds: wall time from the first read to the last write.
    """

    tensors: int
    reused: int
    bytes_in: int
    bytes_out: int
    seconds: float


def default_threads() -> int:
    """One thread per available core, at most 8: beyond that memory bandwidth is the limit."""
    return min(8, usable_cores())


def limits_for(memory: int, threads: int) -> Limits:
    """Divides a memory budget: half of it for buffers in flight, a quarter each for caches and for keys."""
    share = memory // 4 // threads
    return Limits(cache=share, keys=share)


def stream_jobs(
    jobs: Sequence[Job],
    writer: TensorWriter,
    *,
    seed: int = 0,
    memory: int = 2**30,
    threads: int | None = None,
    allow_nonfinite: bool = False,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> StreamReport:
    """Makes every tensor of `jobs` and writes it.

    Args:
        jobs: what to make.
        writer: where to; tensors in `writer.done` are skipped.
        seed: seeds random draws (which also depend on tensor names).
        memory: bytes that buffers, caches and keys may take together; the interpreter and JAX come on top.
            A tensor that cannot be cut into blocks and takes more by itself is worked on alone.
        threads: blocks worked on at a time; default one per core. The output does not depend on it.
        allow_nonfinite: merge NaN and infinity instead of refusing them.
        progress: called with the number of bytes just written, from worker threads.

    Raises:
        CheckpointError: an input is unreadable, or NaN or infinite; integer tensors differ between models.
        OperatorError: a merge is given other numbers of models or values than it takes, or has no meaningful
            result for some tensor.
        OutputError: the output cannot be written.
    """
    check_jobs(jobs)
    started = time.perf_counter()
    todo = [job for job in jobs if job.name not in writer.done and job.size]
    threads = threads or default_threads()
    admission = Admission(memory, threads)
    limits = limits_for(memory, threads)
    runner = _Runner(writer, seed, limits, admission, threads, not allow_nonfinite, progress)
    try:
        with _one_blas_thread() if any(job.bytes_whole for job in todo) else nullcontext():
            runner.run(todo)
    finally:
        runner.close()
    return StreamReport(
        tensors=len(jobs) - sum(job.name in writer.done for job in jobs),
        reused=sum(job.name in writer.done for job in jobs),
        bytes_in=sum(job.bytes_in for job in todo),
        bytes_out=sum(job.bytes_out for job in todo),
        seconds=time.perf_counter() - started,
    )


def _one_blas_thread() -> AbstractContextManager[object]:
    """Context in which a decomposition keeps to the thread that asks: threads of BLAS wait for each other."""
    # What is limited has to be loaded: JAX takes LAPACK from there, at its first decomposition.
    import scipy.linalg.cython_lapack  # noqa: F401
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1, user_api="blas")


def check_jobs(jobs: Sequence[Job]) -> None:
    """Checks what can be known of jobs before a weight is read.

    Raises:
        OperatorError: a merge is given other numbers of models or values than it takes, or a tensor that is
            too large for it.
    """
    for job in jobs:
        if job.merge is not None:
            job.merge.check(len(job.sources), job.base is not None)
            _check_size(job)


def _check_size(job: Job) -> None:
    if job.merge is not None and job.bytes_whole and job.size >= 2**32:
        raise OperatorError(
            f"tensor {job.name!r} has {job.size} elements, and {job.merge.inputs.operator} works on whole "
            "tensors of fewer than 2^32; merge this one by another method, with a `modules` recipe."
        )


class Admission:
    """Lets tensors in as the budget allows: one that cannot be cut into blocks holds all its bytes at once.

    Tensors in blocks keep to their thread's share of the budget by themselves, but for weights that have to
    be decomposed before a block of them can be read. What exceeds the budget by itself runs alone.
    """

    def __init__(self, memory: int, threads: int) -> None:
        self._memory, self._share = memory, memory // threads
        self._held = self._running = 0
        self._changed = threading.Condition()

    @contextmanager
    def admitted(self, job: Job) -> Iterator[None]:
        """Waits until the job fits beside those that run; holds its bytes until it ends."""
        need = (job.bytes_whole or self._share) + job.bytes_decomposed
        with self._changed:
            self._changed.wait_for(lambda: not self._running or self._held + need <= self._memory)
            self._held, self._running = self._held + need, self._running + 1
        try:
            yield
        finally:
            with self._changed:
                self._held, self._running = self._held - need, self._running - 1
                self._changed.notify_all()


class BlockThreads:
    """Workers that share the blocks of large tensors.

    Args:
        threads: number of workers; a caller of `map` waits for them.
    """

    def __init__(self, threads: int) -> None:
        self._threads, self._pool = threads, ThreadPoolExecutor(threads, "block")
        self._stop = False

    def stop(self) -> None:
        """Begins no further block; those that wait for one get a `CancelledError`."""
        self._stop = True

    def close(self) -> None:
        """Ends the workers."""
        self.stop()
        self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[TensorBlock], T], blocks: Sequence[TensorBlock]) -> Iterator[T]:
        """Applies a function to blocks, results in order, a bounded number in flight."""
        if len(blocks) <= 1 or self._threads == 1:
            for block in blocks:
                yield function(block)
            return
        waiting: deque[Future[T]] = deque()
        try:
            for block in blocks:
                if self._stop:
                    raise CancelledError
                waiting.append(self._pool.submit(function, block))
                if len(waiting) >= 2 * self._threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            wait(waiting)


class _Runner:
    """Two pools: one thread per tensor in progress, and workers that share the blocks of large tensors."""

    def __init__(
        self,
        writer: TensorWriter,
        seed: int,
        limits: Limits,
        admission: Admission,
        threads: int,
        check: bool,
        progress: Callable[[int], None],
    ) -> None:
        self._writer, self._seed, self._limits = writer, seed, limits
        self._check, self._progress, self._admission = check, progress, admission
        self._buffers = Buffers()
        self._tensors = ThreadPoolExecutor(threads, "tensor")
        self._blocks = BlockThreads(threads)
        self._stop = False

    def close(self) -> None:
        self._stop = True
        self._blocks.stop()
        self._tensors.shutdown(cancel_futures=True)
        self._blocks.close()

    def run(self, jobs: Sequence[Job]) -> None:
        pooled = [job for job in jobs if job.merge is not None and looks_at_tree(job.merge)]
        if pooled:
            run_tree([self._run_of(job) for job in pooled], self._write)
        rest = [job for job in jobs if job.merge is None or not looks_at_tree(job.merge)]
        futures = [self._tensors.submit(self._one, job) for job in rest]
        _, pending = wait(futures, return_when=FIRST_EXCEPTION)
        if pending:
            self._stop = True
            self._blocks.stop()
            for future in pending:
                future.cancel()
        errors = [e for f in futures if not f.cancelled() and (e := f.exception()) is not None]
        for error in errors:
            if not isinstance(error, CancelledError):
                raise error

    def _run_of(self, job: Job) -> TensorRun:
        return TensorRun(
            job,
            seed=self._seed,
            limits=self._limits,
            buffers=self._buffers,
            map_blocks=self._blocks.map,
            check=self._check,
        )

    def _one(self, job: Job) -> None:
        if self._stop:
            return
        if job.merge is None:
            self._copy(job)
            return
        with self._admission.admitted(job):
            if self._stop:
                return
            run = self._run_of(job)
            for step in run.merge.steps():
                run.take(*step)
            run.write(self._write)

    def _write(self, name: str, start: int, array: np.ndarray) -> None:
        self._writer.write(name, start, array)
        self._progress(array.nbytes)

    def _copy(self, job: Job) -> None:
        """Copies a tensor; where several models have it, all must hold the same bytes."""
        for start in range(0, job.size, BLOCK_ELEMENTS):
            self._write(job.name, start, copied(job, start, min(BLOCK_ELEMENTS, job.size - start)))


def copied(job: Job, start: int, count: int) -> np.ndarray:
    """Elements `[start, start + count)` of a tensor that is copied, in the job's dtype.

    Raises:
        CheckpointError: an input cannot be read, or models hold different values there.
    """
    first, *others = job.sources
    piece = _read(first, start, count)
    for position, other in enumerate(others, start=1):
        if _read(other, start, count).tobytes() != piece.tobytes():
            names = job.model_names or tuple(f"model {i}" for i in range(len(job.sources)))
            raise CheckpointError(
                f"tensor {job.name!r} ({first.dtype}) cannot be averaged and differs between "
                f"{names[0]} and {names[position]}; make them equal, or take it from one model with "
                "a `modules` or `slices` recipe."
            )
    return piece if piece.dtype == job.dtype else piece.astype(job.dtype)


def _read(source: Any, start: int, count: int) -> np.ndarray:
    piece = np.empty(count, source.dtype)
    source.read_into(start, piece)
    return piece


def looks_at_tree(merge: Any) -> bool:
    """Whether a merge measures all tensors together."""
    return any(getattr(declared, "scope", "tensor") == "tree" for _, _, declared in merge.steps())
