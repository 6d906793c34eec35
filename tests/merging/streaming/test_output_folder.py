"""Jobs become a published folder, with whatever further files the digests of their tensors ask for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mergelab.errors import OutputError
from mergelab.merging.engine import write_model
from mergelab.merging.engine.job import Job
from tests.merging.streaming.test_stream_jobs import ArraySource

ARRAYS = {
    "big": np.arange(60, dtype=np.float32).reshape(6, 10),
    "ids": np.arange(3),
    "none": np.zeros((0, 2), np.float16),
}
JOBS = [Job(name, x.shape, x.dtype, (ArraySource(name, x),)) for name, x in ARRAYS.items()]


def test_files_are_called_once_with_the_digests(tmp_path: Path) -> None:
    calls: list[Mapping[str, str]] = []

    def files(digests: Mapping[str, str]) -> dict[str, bytes]:
        calls.append(digests)
        return {"card.txt": b"card"}

    options = {"shard_bytes": 200, "sha256": True}
    written = write_model(tmp_path / "out", JOBS, {"a": 1}, {"work": "1"}, files, **options)
    (digests,) = calls
    assert digests.keys() == ARRAYS.keys() and len(set(digests.values())) == 3
    marker = json.loads((tmp_path / "out" / "mergelab.json").read_text())
    assert marker["tensors"] == digests
    found = {k: v for file in written.sha256 for k, v in load_file(tmp_path / "out" / file).items()}
    assert len(written.sha256) == 2 and found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"a": 1}
    assert (tmp_path / "out" / "card.txt").read_bytes() == b"card"
    assert (tmp_path / "out" / "SHA256SUMS").read_text().count("\n") == 2


def test_a_finished_output_is_found_again_and_only_by_the_same_work(tmp_path: Path) -> None:
    first = write_model(tmp_path / "out", JOBS, {}, {"work": "1"}, sha256=True)
    assert first.report.tensors == 3
    seen: list[int] = []
    again = write_model(
        tmp_path / "out", JOBS, {}, {"work": "1"}, resume=True, sha256=True, progress=seen.append
    )
    assert (again.report.reused, again.sha256, seen) == (3, first.sha256, [])
    with pytest.raises(OutputError, match="is not empty"):
        write_model(tmp_path / "out", JOBS, {}, {"work": "2"}, resume=True)


def test_files_that_fail_leave_nothing_published_and_can_be_given_again(tmp_path: Path) -> None:
    def fails(digests: Mapping[str, str]) -> dict[str, bytes]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_model(tmp_path / "out", JOBS, {}, {"work": "1"}, fails)
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputError, match="run without --resume"):
        write_model(tmp_path / "out", JOBS, {}, {"work": "2"}, resume=True)
    again = write_model(tmp_path / "out", JOBS, {}, {"work": "1"}, resume=True)
    assert again.report.reused == 3
