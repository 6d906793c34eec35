"""A text that processes share in lanes: batches do not depend on how many read them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from mergelab.activations.kept import KeptRows
from mergelab.activations.lane_rows import LaneRows, LaneStream
from mergelab.errors import SAEError

LANES, BATCH = 8, 32


class Lane:
    """Rows that carry their lane and number; one in ten is long, one in four does not count."""

    d_in = 3

    def __init__(self, lane: int, rows: int) -> None:
        self.lane, self.rows = lane, rows

    def at(self, site: str) -> Lane:
        return self

    def read(self, start: int, stop: int) -> np.ndarray:
        numbers = np.arange(start, stop)
        length = np.where(numbers % 10 == 3, 1e6, 1.0)
        return np.stack([np.full(stop - start, self.lane), numbers, length], axis=1).astype(np.float32)


def counted(start: int, stop: int) -> np.ndarray:
    return np.arange(start, stop) % 4 != 0


def stream(part: np.ndarray, sizes: list[int] | None = None, seed: int = 0) -> LaneStream:
    sizes = sizes or [200 + 30 * lane for lane in range(LANES)]
    lanes: Any = {lane: Lane(lane, rows) for lane, rows in enumerate(sizes)}
    kept = {lane: KeptRows(counted, limit=1e5) for lane in lanes}
    there = sum(int(counted(0, rows).sum()) for rows in sizes)
    return LaneStream(
        LaneRows(LANES, lanes, "site", kept, sum(sizes), there), BATCH, seed=seed, buffer_rows=512, part=part
    )


@pytest.mark.parametrize("processes", [2, 3, 5, 8, 11])
def test_parts_of_any_number_of_processes_are_the_batch(processes: int) -> None:
    whole = stream(np.arange(BATCH))
    parts = [stream(part) for part in np.array_split(np.arange(BATCH), processes)]
    for _ in range(40):
        expected = next(whole)
        found = np.concatenate([next(part).input for part in parts])
        np.testing.assert_array_equal(found, expected.input)
        np.testing.assert_array_equal(expected.input[:, 0], np.repeat(np.arange(LANES), BATCH // LANES))
        assert counted(0, 500)[expected.rows].all() and (expected.input[:, 2] == 1).all()
    assert all(part.state() == whole.state() for part in parts)


def test_lanes_go_on_where_they_stood_and_are_the_seeds_own() -> None:
    whole = stream(np.arange(BATCH))
    seen = [next(whole).input for _ in range(7)]
    state = json.loads(json.dumps(whole.state()))
    again = stream(np.arange(8, 24))
    again.restore(state)
    np.testing.assert_array_equal(next(again).input, next(whole).input[8:24])
    assert not np.array_equal(next(stream(np.arange(BATCH), seed=1)).input, seen[0])
    with pytest.raises(SAEError, match="the data stood at rows="):
        stream(np.arange(BATCH), [300] * LANES).restore(state)


def test_the_sample_is_of_all_lanes() -> None:
    drawn = stream(np.arange(BATCH)).draw(160)
    lanes, counts = np.unique(drawn.input[:, 0], return_counts=True)
    assert lanes.tolist() == list(range(LANES)) and set(counts.tolist()) <= {18, 19, 20}
    assert (drawn.input[:, 2] == 1).all() and drawn.examined > 1000
    assert set(drawn.too_long % 10) == {3} and len(drawn.too_long) > 90  # which the overview counts
    assert len(np.unique(drawn.input[:, :2], axis=0)) == len(drawn.input)


def test_a_lane_too_short_for_a_batch_is_named() -> None:
    with pytest.raises(SAEError, match="lane 5 of the text has 3 rows that count, fewer than the 4"):
        stream(np.arange(BATCH), [200] * 5 + [4] + [200] * 2)
