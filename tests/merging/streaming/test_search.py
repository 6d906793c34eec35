"""Searching keys block by block finds what sorting all of them finds, whatever blocks and sample are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mergelab.merging.engine import order_search as search_module
from mergelab.merging.engine.order_search import KeySearch
from mergelab.operators.order_statistics import Selection, select_on_host

HIGHEST = 2**32 - 1


def search(
    blocks: list[np.ndarray], count: int, sample: np.ndarray, limit: int = 2**20
) -> tuple[Selection, int]:
    """Runs a search to its end as the runner does: the selection, and how many passes it took."""
    found = KeySearch(count, sum(b.size for b in blocks), limit=limit)
    found.narrow(sample)
    passes = 1
    while not found.conclude([found.look(b) for b in blocks]):
        passes += 1
        assert passes < 100, "the bracket does not shrink"
    position = found.tie_block()
    if position is not None:
        found.place_tie(position, blocks[position], sum(b.size for b in blocks[:position]))
    return found.selection(), passes


def kept(keys: np.ndarray, selection: Selection) -> np.ndarray:
    """Bool: what a selection keeps of all keys."""
    cutoff = (int(selection.cutoff[0]) << 32) | int(selection.cutoff[1])
    return (keys > selection.threshold) | ((keys == selection.threshold) & (np.arange(keys.size) < cutoff))


KEYS = hnp.arrays(
    np.uint32,
    st.integers(1, 200),
    elements=st.one_of(st.integers(0, 5), st.integers(0, HIGHEST), st.sampled_from([HIGHEST, HIGHEST - 1])),
)


@given(KEYS, st.data())
def test_it_is_the_selection_of_a_sort(keys: np.ndarray, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, keys.size))
    cuts = sorted(data.draw(st.sets(st.integers(1, keys.size), max_size=4)))
    blocks = [b for b in np.split(keys, cuts) if b.size]
    sample = keys[:: data.draw(st.integers(1, 40))]
    limit = data.draw(st.sampled_from([1, 2, 7, 2**20]))
    selection, _ = search(blocks, count, sample, limit)
    order = np.lexsort((np.arange(keys.size), -keys.astype(np.int64)))
    expected = np.zeros(keys.size, bool)
    expected[order[:count]] = True
    np.testing.assert_array_equal(kept(keys, selection), expected)
    assert int(selection.threshold) == int(keys[order[count - 1]])
    if count < keys.size:
        np.testing.assert_array_equal(kept(keys, select_on_host(keys, count)), expected)


@pytest.mark.parametrize("count", [1, 2, 50, 99, 100])
@pytest.mark.parametrize("value", [0, 1, 2**31, HIGHEST])
def test_equal_keys_are_kept_from_the_first(value: int, count: int) -> None:
    keys = np.full(100, value, np.uint32)
    selection, passes = search(list(np.split(keys, 4)), count, keys[::9])
    np.testing.assert_array_equal(kept(keys, selection), np.arange(100) < count)
    assert passes == 1


@pytest.mark.parametrize("count", [1, 300, 5_000, 9_999])
@pytest.mark.parametrize("misleading", [[0], [HIGHEST], [3, 4], [2**30, 2**31]])
def test_a_sample_that_misleads_costs_passes_and_nothing_else(misleading: list[int], count: int) -> None:
    keys = np.random.default_rng(0).integers(0, HIGHEST, 10_000, dtype=np.uint32, endpoint=True)
    blocks = list(np.split(keys, 10))
    selection, passes = search(blocks, count, np.array(misleading, np.uint32))
    assert kept(keys, selection).sum() == count
    assert int(selection.threshold) == int(np.sort(keys)[-count])
    _, well_led = search(blocks, count, keys[::7])
    assert well_led == 1 <= passes


def test_no_sample_at_all_is_enough() -> None:
    keys = np.random.default_rng(0).integers(0, 1000, 5000, dtype=np.uint32)
    selection, _ = search(list(np.split(keys, 5)), 1234, keys[:0])
    assert kept(keys, selection).sum() == 1234


def test_few_keys_may_be_handed_over_and_many_passes_still_end() -> None:
    keys = np.random.default_rng(1).integers(0, HIGHEST, 4000, dtype=np.uint32)
    blocks = list(np.split(keys, 8))
    selection, passes = search(blocks, 1500, keys[::100], limit=8)
    assert kept(keys, selection).sum() == 1500
    assert 1 < passes < 40


@pytest.mark.parametrize("from_end", [1, 5, 20])
@pytest.mark.parametrize("largest", [True, False])
def test_keys_that_are_nearly_all_equal_are_neither_collected_nor_searched_bit_by_bit(
    largest: bool, from_end: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_module, "_HELD", 2**12)
    monkeypatch.setattr(search_module, "_FEWEST", 16)
    keys = np.full(2**17, 0x3F800000, np.uint32)
    keys[[0, 70_000, -1]] += np.array([7, 3, 5], np.uint32)
    keys[[1, 80_000]] -= np.array([7, 3], np.uint32)
    count = from_end if largest else keys.size - from_end
    blocks = list(np.split(keys, 32))
    held = sum(KeySearch(count, keys.size).look(b).keys.size for b in blocks)
    assert held <= 2**12
    selection, passes = search(blocks, count, keys[::50])
    assert passes <= 8  # halving the range of keys takes 30
    order = np.lexsort((np.arange(keys.size), -keys.astype(np.int64)))
    expected = np.zeros(keys.size, bool)
    expected[order[:count]] = True
    np.testing.assert_array_equal(kept(keys, selection), expected)


@pytest.mark.parametrize("value", [3, 4, 9])
def test_what_is_found_in_a_block_does_not_keep_the_block_alive(value: int) -> None:
    keys = np.full(1000, value, np.uint32)
    whole, bracketed, levelled = (KeySearch(500, 1000, limit=10) for _ in range(3))
    bracketed.low, bracketed.high = 4, 5
    levelled.narrow(np.array([4, 5, 4, 5], np.uint32))
    for one in (whole, bracketed, levelled):
        assert not np.may_share_memory(one.look(keys).keys, keys)
        assert one.look(keys).keys.base is None


def test_looking_hands_over_no_more_than_the_limit() -> None:
    keys = np.arange(1000, dtype=np.uint32)
    found = KeySearch(10, 1000, limit=16).look(keys)
    assert (found.above, found.inside, found.complete) == (0, 1000, False)
    assert found.keys.size <= 16


@pytest.mark.parametrize("below", [True, False])
def test_indexes_beyond_32_bits_are_placed(below: bool) -> None:
    """The block that holds the last tie may start anywhere; nothing but its start says where."""
    keys = np.array([1, 7, 7, 2, 7], np.uint32)
    start = 2**32 - 2 if below else 2**33
    found = KeySearch(2, 5)
    assert found.conclude([found.look(keys)])
    position = found.tie_block()
    assert position == 0
    found.place_tie(position, keys, start)
    cutoff = found.selection().cutoff
    assert (int(cutoff[0]) << 32) | int(cutoff[1]) == start + 3


def test_another_choice_among_ties_would_be_seen() -> None:
    keys = np.array([7, 7, 7], np.uint32)
    selection, _ = search([keys], 1, keys)
    assert kept(keys, selection).tolist() == [True, False, False]
    later = selection._replace(cutoff=np.array([0, 2], np.uint32))
    assert kept(keys, later).tolist() != kept(keys, selection).tolist()
