"""Activations from files, in shuffled batches: every row once, any place exactly, parts that make a whole."""

from __future__ import annotations

import itertools
import json
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mergelab.activations import ActivationStream, Batch, Prefetch, open_activation_files
from mergelab.errors import CheckpointError, NonFiniteError, SAEError
from mergelab.sae.toy import ToyGroundTruth


class Numbered:
    """Rows that carry their number."""

    def __init__(self, rows: int, d_in: int = 2, factor: float = 1.0) -> None:
        self.rows, self.d_in, self.factor = rows, d_in, factor
        self.read_rows = 0

    def read(self, start: int, stop: int) -> np.ndarray:
        self.read_rows += stop - start
        return np.repeat(np.arange(start, stop, dtype=np.float32)[:, None], self.d_in, 1) * self.factor


def _take(stream: ActivationStream, count: int) -> list[Batch]:
    return list(itertools.islice(stream, count))


@given(rows=st.integers(100, 6000), batch=st.integers(1, 100), seed=st.integers(0, 99))
def test_every_row_once_an_epoch(rows: int, batch: int, seed: int) -> None:
    stream = ActivationStream(Numbered(rows), batch, seed=seed, buffer_rows=2048)
    lanes = stream.lanes
    epoch = rows - rows % lanes  # what the lanes share equally
    taken = np.concatenate([b.rows.reshape(lanes, -1) for b in _take(stream, 2 * rows // batch + 1)], axis=1)
    first, second = taken[:, : epoch // lanes], taken[:, epoch // lanes : 2 * epoch // lanes]
    assert len(np.unique(first)) == epoch and 0 <= first.min() <= first.max() < rows
    assert len(np.unique(second)) == second.size
    shared = first[:, : second.shape[1]]
    assert rows < 200 or (shared != second).mean() > 0.9  # a new order each epoch


def test_no_row_is_left_out_for_ever() -> None:
    stream = ActivationStream(Numbered(1000), 64, seed=0)
    assert len(np.unique(np.concatenate([b.rows for b in _take(stream, 15)]))) == 960
    assert len(np.unique(np.concatenate([b.rows for b in _take(stream, 60)]))) == 1000


def test_rows_carry_their_numbers_and_targets_their_rows() -> None:
    stream = ActivationStream(Numbered(3000), 64, target=Numbered(3000, 3, factor=-2), seed=1)
    for batch in _take(stream, 10):
        np.testing.assert_array_equal(batch.input[:, 0], batch.rows)
        np.testing.assert_array_equal(batch.target[:, 2], -2.0 * batch.rows)


@given(at=st.integers(0, 200), batch=st.sampled_from([7, 64, 1500]))
def test_a_stream_goes_on_where_it_stood(at: int, batch: int) -> None:
    def make() -> ActivationStream:
        return ActivationStream(Numbered(5000), batch, seed=3, buffer_rows=2000)

    whole = make()
    _take(whole, at)
    state = json.loads(json.dumps(whole.state()))
    source = Numbered(5000)
    again = ActivationStream(source, batch, seed=3, buffer_rows=2000)
    again.restore(state)
    wanted, got = _take(whole, 3), _take(again, 3)
    for mine, theirs in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(mine.rows, theirs.rows)
    assert source.read_rows <= 5000 + 3 * batch + 6 * 2048  # nothing that came before was read


@pytest.mark.parametrize(
    ("batch", "processes"), [(64, 2), (64, 32), (63, 3), (60, 5), (96, 6), (384, 96), (512, 128)]
)
def test_any_number_of_processes_shares_a_batch_and_the_reading(batch: int, processes: int) -> None:
    order = {"seed": 3, "buffer_rows": 8192}
    sources = [Numbered(20_000) for _ in range(processes)]
    parts = [
        ActivationStream(source, batch, **order, part=part, readers=processes)
        for source, part in zip(sources, np.arange(batch).reshape(processes, -1), strict=True)
    ]
    whole = ActivationStream(Numbered(20_000), batch, **order)
    whole.restore(parts[0].state())  # a resume in one process: more than 64 had lanes of their own
    lanes = whole.lanes
    assert lanes == 64 or processes > 64 or batch % 64
    seen = []
    for _ in range(20_000 // batch):
        found = next(whole).rows
        np.testing.assert_array_equal(np.concatenate([next(part).rows for part in parts]), found)
        seen.append(found)
    assert len(np.unique(np.concatenate(seen))) == 20_000 // batch * batch  # none is given twice
    read = [source.read_rows for source in sources]
    assert sum(read) <= 20_000 and max(read) <= -(-20_000 // processes)  # nor read twice


@pytest.mark.parametrize(("buffer_rows", "drawn"), [(8192, 7712), (16_384, 10_000), (1024, 4096)])
def test_a_sample_is_of_rows_that_are_read_in_any_case(buffer_rows: int, drawn: int) -> None:
    source = Numbered(20_000)
    stream = ActivationStream(source, 64, seed=1, buffer_rows=buffer_rows)
    sample = stream.draw(10_000)
    first = drawn // 64 * 64
    assert len(sample.rows) == first and source.read_rows <= max(buffer_rows, drawn + 1024)
    np.testing.assert_array_equal(sample.input[:, 0], sample.rows)
    seen = np.concatenate([b.rows for b in _take(stream, 20_000 // 64)])
    assert source.read_rows <= 20_000  # an epoch costs its rows, the sample none
    np.testing.assert_array_equal(sample.rows, np.unique(seen[:first]))
    plain = ActivationStream(Numbered(20_000), 64, seed=1, buffer_rows=buffer_rows)
    np.testing.assert_array_equal(np.concatenate([b.rows for b in _take(plain, 20_000 // 64)]), seen)


def test_a_sample_of_fewer_rows_than_lanes_or_for_no_rows() -> None:
    assert len(ActivationStream(Numbered(70), 64, buffer_rows=8).draw(100).rows) == 64
    nothing = ActivationStream(Numbered(70), 64, part=np.arange(0))
    assert nothing.draw(100).input.shape == (0, 2)


def test_a_part_of_a_lane_is_taken_from_the_whole_of_it() -> None:
    whole = ActivationStream(Numbered(5000), 64, seed=1, buffer_rows=2048)
    parts = np.array_split(np.random.default_rng(0).permutation(64), 3)
    again = [
        ActivationStream(Numbered(5000), 64, seed=1, buffer_rows=2048, part=np.sort(part), readers=3)
        for part in parts
    ]
    state = {**whole.state(), "lanes": 4}
    for stream in (whole, *again):
        stream.restore(state)
    for _ in range(100):
        expected = next(whole)
        for stream in again:
            found = next(stream)
            np.testing.assert_array_equal(found.rows, expected.rows[stream.part])
            np.testing.assert_array_equal(found.input[:, 0], found.rows)


def test_rows_of_far_blocks_meet() -> None:
    stream = ActivationStream(Numbered(100_000), 1024, seed=0, buffer_rows=32_768)
    rows = next(stream).rows
    assert len(np.unique(rows // 1024)) > 25


def test_what_cannot_be_shuffled_or_resumed_is_refused() -> None:
    with pytest.raises(SAEError, match="from 1 to the 10 rows"):
        ActivationStream(Numbered(10), 11)
    with pytest.raises(SAEError, match="same tokens"):
        ActivationStream(Numbered(10), 2, target=Numbered(11))
    state = ActivationStream(Numbered(10), 2, seed=1).state()
    with pytest.raises(SAEError, match="seed=1"):
        ActivationStream(Numbered(10), 2, seed=2).restore(state)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((kind, dtype) for kind in ("npy", "safetensors") for dtype in ("float32", "float16", "float64")),
        ("safetensors", ml_dtypes.bfloat16),  # numpy's format has none
    ],
)
def test_files_are_one_source(tmp_path: Path, kind: str, dtype: Any) -> None:
    x = np.random.default_rng(0).standard_normal((50, 6)).astype(dtype)
    for i, piece in enumerate((x[:20], x[20:20], x[20:21], x[21:])):
        path = tmp_path / f"part{i}.{kind}"
        np.save(path, piece) if kind == "npy" else save_file({"any": piece}, path)
    source = open_activation_files(tmp_path / f"*.{kind}")
    assert (source.rows, source.d_in) == (50, 6)
    for start, stop in ((0, 50), (19, 22), (20, 21), (49, 50)):
        np.testing.assert_array_equal(source.read(start, stop), x[start:stop].astype(np.float32))


def _integers(path: Path) -> None:
    np.save(path, np.ones((4, 4), np.int32))


@pytest.mark.parametrize(
    ("name", "write", "words"),
    [
        ("b.npy", lambda p: np.save(p, np.ones((3, 7), np.float32)), "7 wide"),
        ("b.npy", lambda p: np.save(p, np.ones(3, np.float32)), "shape \\[3\\]"),
        ("b.npy", _integers, "int32"),
        ("b.npy", lambda p: p.write_bytes(p.with_name("a.npy").read_bytes()[:-9]), "ends at byte 167, but"),
        ("b.npy", lambda p: np.save(p, np.array([{}], object), allow_pickle=True), "never unpickled"),
        ("b.txt", lambda p: p.write_text("1"), "from .npy and .safetensors"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, write: Any, words: str) -> None:
    np.save(tmp_path / "a.npy", np.ones((3, 4), np.float32))
    write(tmp_path / name)
    with pytest.raises(CheckpointError, match=words):
        open_activation_files(tmp_path / "*")
    with pytest.raises(CheckpointError, match="no file matches"):
        open_activation_files(str(tmp_path / "*.none"))


def test_a_row_that_is_not_finite_is_named(tmp_path: Path) -> None:
    x = np.ones((9, 4), np.float32)
    x[5, 2] = np.inf
    np.save(tmp_path / "a.npy", x)
    with pytest.raises(NonFiniteError, match="row 5 holds"):
        open_activation_files(tmp_path / "a.npy").read(3, 8)


def test_batches_made_ahead_are_the_same_and_their_place_is_the_consumers() -> None:
    truth = ToyGroundTruth(d_in=8, n_features=16, l0=2.0, rows=4096)
    plain, before = ActivationStream(truth, 256, seed=1), threading.active_count()
    with Prefetch(ActivationStream(truth, 256, seed=1), lambda b: b.input, ahead=3) as ahead:
        for _ in range(20):
            assert ahead.state() == plain.state()
            np.testing.assert_array_equal(next(ahead), next(plain).input)
        assert ahead.trace.batches == 20
    assert threading.active_count() <= before


def test_an_error_in_the_thread_reaches_the_consumer() -> None:
    class Broken(Numbered):
        def read(self, start: int, stop: int) -> np.ndarray:
            raise OSError("gone")

    with (
        Prefetch(ActivationStream(Broken(100), 10), lambda b: b) as ahead,
        pytest.raises(OSError, match="gone"),
    ):
        next(ahead)
