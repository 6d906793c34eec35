"""Streaming gives the bytes that merging in memory gives, however tensors are cut and threads are many."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from mergelab.errors import CheckpointError, NonFiniteError, OperatorError
from mergelab.merging.engine import blocks, stream_jobs
from mergelab.merging.engine.job import Job
from mergelab.operators.measures import Sum
from tests.operators.cases import CASES, LIGHT, build
from tests.slow import slow_except

SHAPES = {
    "wide": (37, 130),
    "norm": (64,),
    "deep": (3, 5, 70),
    "scalar": (),
    "empty": (0, 4),
    "long": (5000,),
}

# Every shape costs an operator several compiled programs: all meet the first two, one of a kind the rest.
FEW = ("norm", "deep")
OF_EACH_KIND = (
    "ties_rescale",
    "ties_tree",
    "della",
    "nuslerp_row",
    "nuslerp_column",
    "karcher",
    "tsv_m",
    "iso_c",
)


@dataclass(frozen=True)
class ArraySource:
    """An in-memory tensor source."""

    name: str
    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    def read_into(self, start: int, out: np.ndarray) -> None:
        out[:] = self.array.reshape(-1)[start : start + out.size]


class ArrayWriter:
    """Collects what is written; refuses holes and double writes."""

    def __init__(self, jobs: list[Job]) -> None:
        self.arrays = {j.name: np.zeros(j.size, j.dtype) for j in jobs}
        self.written = {j.name: np.zeros(j.size, np.int32) for j in jobs}
        self.done: frozenset[str] = frozenset()

    def write(self, name: str, start: int, array: np.ndarray) -> None:
        self.arrays[name][start : start + array.size] = array
        self.written[name][start : start + array.size] += 1

    def result(self, jobs: list[Job]) -> dict[str, np.ndarray]:
        assert all((w == 1).all() for w in self.written.values())
        return {j.name: self.arrays[j.name].reshape(j.shape) for j in jobs}


def trees(count: int, dtype: Any, shapes: Iterable[str]) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    base = {k: rng.standard_normal(SHAPES[k]) for k in shapes}
    return [
        {
            k: np.asarray(v + 0.5 * (i > 0) * rng.standard_normal(v.shape)).astype(dtype)
            for k, v in base.items()
        }
        for i in range(count)
    ]


def jobs_for(merge: Any, models: list[Any], base: Any, dtype: Any = np.float32) -> list[Job]:
    return [
        Job(
            name=name,
            shape=models[0][name].shape,
            dtype=np.dtype(dtype),
            sources=tuple(ArraySource(name, m[name]) for m in models),
            base=None if base is None else ArraySource(name, base[name]),
            merge=merge,
            model_names=tuple(f"model{i}" for i in range(len(models))),
        )
        for name in models[0]
    ]


def streamed(jobs: list[Job], **options: Any) -> dict[str, np.ndarray]:
    writer = ArrayWriter(jobs)
    stream_jobs(jobs, writer, **options)
    return writer.result(jobs)


def inputs(
    case: str, dtype: Any = np.float32, shapes: Iterable[str] = tuple(SHAPES)
) -> tuple[Any, list[Any], Any]:
    """A case's merge and random models, the base (or None) last."""
    merge, count, with_base = build(case)
    base, *models = trees(count + 1, dtype, shapes)
    return merge, models, base if with_base else None


@pytest.mark.parametrize("case", slow_except(LIGHT, CASES))
def test_streamed_equals_in_memory(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 1024)  # several blocks even for small tensors
    merge, models, base = inputs(case, shapes=SHAPES if case in OF_EACH_KIND else FEW)
    expected = merge(models, base, seed=3)
    found = streamed(jobs_for(merge, models, base), seed=3, threads=2)
    # Sums over a tensor are taken block by block when streaming: their last bits, and so the coefficients
    # that depend on them, may differ. Everything else is the same to the bit.
    takes_sums = merge.grain == "tensor" or any(isinstance(declared, Sum) for _, _, declared in merge.steps())
    for name in models[0]:
        if takes_sums:
            np.testing.assert_allclose(np.asarray(expected[name]), found[name], 1e-6, 1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(np.asarray(expected[name]), found[name], err_msg=name)


@pytest.mark.parametrize(
    "case", ["ties", "della", "karcher", "dare_ties", "sce_topk", "ties_tree", "arcee_fusion"]
)
def test_threads_memory_and_order_do_not_change_a_byte(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 1024)
    shapes = ("deep", "norm", "long") if case == "ties_tree" else ("deep", "norm")
    merge, models, base = inputs(case, ml_dtypes.bfloat16, shapes)
    jobs = jobs_for(merge, models, base, ml_dtypes.bfloat16)
    reference = streamed(jobs, threads=1, memory=2**30)
    for options in ({"threads": 3}, {"memory": 0}, {"memory": 0, "threads": 2}):
        again = streamed(jobs[::-1], **options)
        for name in shapes:
            assert reference[name].tobytes() == again[name].tobytes(), (name, options)


def test_another_seed_draws_other_entries() -> None:
    merge, models, base = inputs("dare_linear")
    jobs = jobs_for(merge, models, base)
    one, two = streamed(jobs, seed=1), streamed(jobs, seed=2)
    assert not np.array_equal(one["long"], two["long"])


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_every_float_dtype_is_read_and_written(dtype: Any) -> None:
    merge, models, base = inputs("task_arithmetic", dtype)
    found = streamed(jobs_for(merge, models, base, dtype))
    for name in SHAPES:
        delta = sum(
            np.float32(w) * (m[name].astype(np.float32) - base[name].astype(np.float32))
            for w, m in zip((0.5, 0.3, -0.4), models, strict=True)
        )
        expected = (base[name].astype(np.float32) + np.float32(0.7) * delta).astype(dtype)
        assert found[name].dtype == dtype
        same = found[name].astype(np.float32) == expected.astype(np.float32)
        assert same.mean() > 0.98 if same.size else True, name


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_nonfinite_inputs_are_named_and_counted(value: float, dtype: Any) -> None:
    merge, models, base = inputs("linear", dtype)
    models[1]["wide"][3, 4] = value
    jobs = jobs_for(merge, models, base)
    with pytest.raises(NonFiniteError, match=r"'wide' of model1 .*allow-nonfinite") as caught:
        streamed(jobs)
    assert ("1 NaN" in str(caught.value)) == np.isnan(value)
    allowed = streamed(jobs, allow_nonfinite=True)
    assert not np.isfinite(allowed["wide"][3, 4].astype(np.float32))


def test_copied_tensors_must_agree() -> None:
    ids = np.arange(10)
    same = Job("ids", (10,), ids.dtype, (ArraySource("ids", ids), ArraySource("ids", ids.copy())))
    np.testing.assert_array_equal(streamed([same])["ids"], ids)
    other = Job("ids", (10,), ids.dtype, (ArraySource("ids", ids), ArraySource("ids", ids + 1)))
    with pytest.raises(CheckpointError, match=r"'ids'.*differs between"):
        streamed([other])


def test_tensors_already_done_are_left_alone() -> None:
    merge, models, base = inputs("linear")
    jobs = jobs_for(merge, models, base)
    writer = ArrayWriter(jobs)
    writer.done = frozenset({"wide"})
    report = stream_jobs(jobs, writer)
    assert (report.tensors, report.reused) == (len(jobs) - 1, 1)
    assert not writer.written["wide"].any()
    assert report.bytes_out == sum(j.bytes_out for j in jobs if j.name != "wide")


def test_wrong_numbers_of_models_are_refused_before_anything_is_read() -> None:
    merge, models, base = inputs("ties")
    with pytest.raises(OperatorError, match="for 2 model"):
        streamed(jobs_for(merge, models[:2], base))
    with pytest.raises(OperatorError, match="base"):
        streamed(jobs_for(merge, models, None))


@pytest.mark.parametrize(("case", "decomposes"), [("iso_c", True), ("linear", False)])
def test_what_is_decomposed_has_one_thread_of_blas(case: str, decomposes: bool) -> None:
    """With more, decompositions of several tensors wait for each other's threads."""
    merge, models, base = inputs(case)
    jobs, seen = jobs_for(merge, models, base), []

    class Watching(ArrayWriter):
        def write(self, name: str, start: int, array: np.ndarray) -> None:
            seen.append({found["num_threads"] for found in threadpool_info() if found["user_api"] == "blas"})
            super().write(name, start, array)

    with threadpool_limits(2, user_api="blas"):
        stream_jobs(jobs, Watching(jobs))
        after = {found["num_threads"] for found in threadpool_info() if found["user_api"] == "blas"}
    assert seen and all(threads == ({1} if decomposes else {2}) for threads in seen) and after == {2}
