"""Boxes of stored tensors: blocks partition them, runs enumerate them, copies move every element."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergelab.models import save
from mergelab.models.layout import (
    Box,
    blocks,
    box_shape,
    box_size,
    intersection,
    join,
    relative,
    runs,
    slices,
    widen,
)


@st.composite
def views(draw: st.DrawFn) -> tuple[tuple[int, ...], Box]:
    """A shape and a box of it that is not empty."""
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=4)))
    lows = [draw(st.integers(0, n - 1)) for n in shape]
    return shape, tuple((low, draw(st.integers(low + 1, n))) for low, n in zip(lows, shape, strict=True))


def elements(shape: tuple[int, ...], box: Box) -> np.ndarray:
    return np.arange(int(np.prod(shape))).reshape(shape)[slices(box)].reshape(-1)


@given(views())
def test_runs_are_the_elements_of_a_box_in_order(view: tuple[tuple[int, ...], Box]) -> None:
    shape, box = view
    starts, length = runs(shape, box)
    found = (starts[:, None] + np.arange(length)[None, :]).reshape(-1)
    np.testing.assert_array_equal(found, elements(shape, box))
    gaps = np.diff(starts) - length
    assert (gaps > 0).all(), "runs that touch are one run"


@given(views(), st.integers(1, 40))
def test_blocks_are_a_box_in_order_and_within_the_limit(
    view: tuple[tuple[int, ...], Box], limit: int
) -> None:
    shape, box = view
    parts = list(blocks(box, limit))
    assert all(box_size(part) <= limit for part in parts)
    np.testing.assert_array_equal(
        np.concatenate([elements(shape, part) for part in parts]), elements(shape, box)
    )
    assert len(parts) == 1 or box_size(box) > limit


@given(views(), st.sampled_from([1, 512, 100_000]))
def test_widening_takes_in_short_gaps_only(view: tuple[tuple[int, ...], Box], itemsize: int) -> None:
    shape, box = view
    wide = widen(shape, box, itemsize)
    assert intersection(wide, box) == box
    before, after = runs(shape, box)[0], runs(shape, wide)[0]
    assert len(after) <= len(before)
    extra = np.setdiff1d(elements(shape, wide), elements(shape, box))
    if extra.size:  # no stretch of what is read besides is as long as a page
        stretches = np.split(extra, np.flatnonzero(np.diff(extra) > 1) + 1)
        assert max(map(len, stretches)) * itemsize < 4096
    if itemsize == 100_000:
        assert wide == box


def test_boxes_are_joined_if_they_fill_their_hull() -> None:
    left, right, below = ((0, 2), (0, 3)), ((0, 2), (3, 5)), ((2, 3), (0, 5))
    assert join([left, right]) == [((0, 2), (0, 5))]
    assert join([left, left]) == [left]
    assert join([left, below]) == [left, below]
    assert join([left, right, below]) == [((0, 3), (0, 5))]
    assert intersection(left, right) is None
    assert relative(right, ((0, 2), (1, 5))) == ((0, 2), (2, 4))


@given(st.integers(1, 80), st.integers(1, 90), st.data())
def test_transposed_copies_move_every_element(rows: int, columns: int, data: Any) -> None:
    dtype = data.draw(st.sampled_from([np.uint8, np.float16, np.float32, np.float64, np.complex128]))
    lead = data.draw(st.sampled_from([(), (3,)]))
    row, column = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    shape = (*lead, rows, columns)
    source = np.random.default_rng(0).normal(size=shape).astype(dtype)
    part = (..., slice(row, None), slice(column, None))
    for turned in (False, True):
        whole = np.zeros((*lead, columns, rows), dtype).swapaxes(-1, -2)
        from_, to = (source, whole) if not turned else (np.asfortranarray(source), np.zeros(shape, dtype))
        save.copy(from_[part], to[part])
        np.testing.assert_array_equal(to[part], source[part])
        outside = to.copy()
        outside[part] = 0
        assert not outside.any()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_transposed_copies_cross_their_tiles(dtype: Any) -> None:
    source = np.random.default_rng(0).normal(size=(131, 4100)).astype(dtype)
    target = np.zeros((4100, 132), dtype)
    save.copy(source, target.T[:131])
    np.testing.assert_array_equal(target[:, :131], source.T)
    assert box_shape(((0, 4100), (0, 131))) == target[:, :131].shape
    assert not target[:, 131].any()
