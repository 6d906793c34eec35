"""Exact order statistics: the host, the device and a plain sort select the same elements, ties included."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mergelab import operators as ops
from mergelab.operators.order_statistics import (
    RowQuestion,
    Selection,
    above_place,
    above_place_on_host,
    kept_count,
    magnitude_key,
    ordered_key,
    ordered_value,
    select_on_device,
    select_on_host,
    selected,
    split_words,
    trivial_selection,
)
from mergelab.operators.region import Region, whole
from tests.operators import reference

SIZE = 40
FEW_VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, -2.0, 1e-40, -1e-40, 3e38])
VALUES = hnp.arrays(np.float32, SIZE, elements=st.one_of(FEW_VALUES, st.floats(width=32, allow_nan=False)))


def mask(keys: np.ndarray, selection: Selection, start: int = 0) -> np.ndarray:
    """Which elements a selection keeps of a block that starts at flat index `start`."""
    region = Region(split_words(start), np.zeros(2, np.uint32), keys.shape)
    return np.asarray(selected(jnp.asarray(keys), region, Selection(*map(jnp.asarray, selection))))


@given(VALUES, st.integers(0, SIZE))
def test_host_device_and_sort_select_the_same_elements(x: np.ndarray, count: int) -> None:
    for keys in map(np.asarray, (magnitude_key(jnp.asarray(x)), ordered_key(jnp.asarray(x)))):
        expected = reference.largest(keys.astype(np.int64), count)
        host, device = select_on_host(keys, count), select_on_device(keys, np.uint32(count))
        assert expected.sum() == count
        np.testing.assert_array_equal(mask(keys, host), expected)
        np.testing.assert_array_equal(mask(keys, device), expected)
        if 0 < count < SIZE:
            assert int(host.threshold) == int(device.threshold)
            np.testing.assert_array_equal(host.cutoff, np.asarray(device.cutoff))


def test_selecting_the_highest_and_lowest_index_would_be_seen() -> None:
    keys = np.array([5, 7, 7, 7, 1], np.uint32)
    np.testing.assert_array_equal(mask(keys, select_on_host(keys, 2)), [False, True, True, False, False])
    highest_index_first = np.array([False, False, True, True, False])
    assert not np.array_equal(reference.largest(keys.astype(np.int64), 2), highest_index_first)


@given(VALUES)
def test_keys_order_as_the_numbers_do(x: np.ndarray) -> None:
    signed, magnitude = np.asarray(ordered_key(jnp.asarray(x))), np.asarray(magnitude_key(jnp.asarray(x)))
    less = x[:, None] < x[None, :]
    assert (signed[:, None] < signed[None, :])[less].all()
    smaller = np.abs(x)[:, None] < np.abs(x)[None, :]
    np.testing.assert_array_equal(magnitude[:, None] < magnitude[None, :], smaller)


@given(VALUES)
def test_an_ordered_key_gives_its_number_back(x: np.ndarray) -> None:
    back = np.asarray(ordered_value(ordered_key(jnp.asarray(x))))
    np.testing.assert_array_equal(back.view(np.uint32), x.view(np.uint32))


def test_ordered_keys_of_zeros_and_infinities() -> None:
    x = np.array([-np.inf, -1.0, -0.0, 0.0, 1e-45, np.inf], np.float32)
    keys = np.asarray(ordered_key(jnp.asarray(x)))
    assert (np.diff(keys.astype(np.int64)) > 0).all()
    assert len(set(np.asarray(magnitude_key(jnp.asarray(x[2:4]))).tolist())) == 1


def test_a_cutoff_beyond_32_bits_of_index_is_compared_in_both_words() -> None:
    keys = np.full(6, 9, np.uint32)
    start = 2**32 - 3
    for kept in range(7):
        selection = Selection(np.uint32(9), split_words(start + kept))
        np.testing.assert_array_equal(mask(keys, selection, start), np.arange(6) < kept)


def test_a_region_counts_elements_past_its_word() -> None:
    high, low = Region(split_words(2**32 - 2), np.zeros(2, np.uint32), (2, 3)).index()
    flat = (np.asarray(high).astype(np.int64) << 32) | np.asarray(low)
    np.testing.assert_array_equal(flat, 2**32 - 2 + np.arange(6).reshape(2, 3))


@pytest.mark.parametrize(
    ("fraction", "size", "count"), [(0.7, 10, 7), (0.29, 100, 28), (1.5, 4, 4), (0.0, 4, 0)]
)
def test_counts_are_those_of_python(fraction: float, size: int, count: int) -> None:
    assert kept_count(fraction, size) == count == min(int(fraction * size), size)


@given(st.sampled_from([0.1, 0.2, 0.3, 0.5, 0.7, 0.9]), st.sampled_from([10, 100, 480, 1000]))
def test_traced_counts_of_decimal_fractions_are_the_same(fraction: float, size: int) -> None:
    traced = jax.jit(lambda f: kept_count(f, size))(fraction)
    assert int(traced) == kept_count(fraction, size)


def test_none_and_all_need_no_look() -> None:
    keys = np.array([3, 3, 1], np.uint32)
    assert trivial_selection(1, 3) is None
    none, every = trivial_selection(0, 3), trivial_selection(3, 3)
    assert none is not None and every is not None
    assert not mask(keys, none).any() and mask(keys, every).all()


KEYS = hnp.arrays(np.uint32, (3, 8), elements=st.one_of(st.integers(0, 3), st.integers(0, 2**32 - 1)))


@given(KEYS, hnp.arrays(np.int32, (3, 8), elements=st.integers(0, 7)), KEYS)
def test_comparisons_within_rows_are_right_on_devices_and_on_the_host(
    keys: np.ndarray, place: np.ndarray, mine: np.ndarray
) -> None:
    question = RowQuestion(keys, place, mine)
    on_device, on_host = np.asarray(above_place(question)), above_place_on_host(question)
    np.testing.assert_array_equal(on_device, on_host)
    expected = [[m > sorted(row)[p] for p, m in zip(*one, strict=True)] for row, *one in zip(*question)]  # noqa: B905
    np.testing.assert_array_equal(on_host, expected)


@given(VALUES, st.floats(0, 1))
def test_trim_keeps_exactly_the_largest(x: np.ndarray, density: float) -> None:
    count = max(1, int(density * SIZE)) if density > 0 else 0
    region = whole((SIZE,), np.zeros(2, np.uint32), "float32")
    stage = ops.Trim(density)
    ((kept,),) = stage.kept((), SIZE, 1)
    assert kept == count
    selection = select_on_host(np.asarray(magnitude_key(jnp.asarray(x))), kept)
    (out,) = stage.apply((jnp.asarray(x),), None, region, (((selection,),),))
    expected = np.where(reference.largest(np.abs(x).astype(np.float64), count), x, 0)
    np.testing.assert_array_equal(out, expected)


@given(st.floats(0, 0.99), st.floats(0, 1))
def test_mask_tails_keeps_a_band_of_the_declared_size(density: float, gamma: float) -> None:
    size, keep, outliers = 50, int(density * 50), int(gamma * 50)
    x = np.random.default_rng(0).permutation(np.arange(1, size + 1)).astype(np.float32)
    merge = ops.chain(ops.MaskTails(density, gamma), ops.WeightedSum())
    out = np.asarray(merge([{"t": x}], {"t": np.zeros_like(x)})["t"])
    assert np.count_nonzero(out) == keep
    ascending = np.sort(x)
    bottom = max(0, size - keep - outliers)
    np.testing.assert_array_equal(np.sort(out[out != 0]), ascending[bottom : bottom + keep])
