"""A re-ordered tensor is what numpy's gather makes of it, wherever a piece begins and ends."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergelab.merging.vocabulary.embedding_rows import RowMap, RowSource

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]


@dataclass
class ArraySource:
    """An array as a tensor source that counts the elements asked of it."""

    array: np.ndarray
    name: str = "model.embed_tokens.weight"
    asked: list[int] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    def read_into(self, start: int, out: np.ndarray) -> None:
        self.asked.append(out.size)
        out[...] = self.array.reshape(-1)[start : start + out.size]


def array(rows: int, width: int, dtype: Any, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32).astype(dtype)


def piece(source: RowSource, start: int, stop: int) -> np.ndarray:
    out = np.empty(stop - start, source.dtype)
    source.read_into(start, out)
    return out


def layout(index: list[int], elsewhere: dict[int, Any] | None = None, padding: int | None = None) -> RowMap:
    return RowMap("a", np.array(index, np.int64), elsewhere or {}, len(index) if padding is None else padding)


@given(st.data(), st.sampled_from(DTYPES), st.integers(1, 12), st.integers(1, 5), st.integers(1, 9))
def test_any_piece_of_any_layout_is_a_gather(
    data: Any, dtype: Any, rows: int, width: int, out_rows: int
) -> None:
    own, lent = array(rows, width, dtype, 1), array(rows + 2, width, dtype, 2)
    index = data.draw(st.lists(st.integers(-1, rows - 1), min_size=out_rows, max_size=out_rows))
    expected = own[np.array(index)]
    elsewhere: dict[int, Any] = {}
    for i in (i for i, row in enumerate(index) if row < 0):
        lender_row = data.draw(st.integers(0, rows + 1))
        kind = data.draw(st.sampled_from(["zero", "lent", "mean"]))
        if kind == "zero":
            elsewhere[i], expected[i] = (), 0
        elif kind == "lent":
            elsewhere[i], expected[i] = (("b", lender_row),), lent[lender_row]
        else:
            elsewhere[i] = (("a", 0), ("b", lender_row))
            mean = (own[0].astype(np.float32) + lent[lender_row].astype(np.float32)) / np.float32(2)
            expected[i] = mean.astype(dtype)
    source = RowSource(ArraySource(own), layout(index, elsewhere), {"b": ArraySource(lent)})
    start = data.draw(st.integers(0, out_rows * width))
    stop = data.draw(st.integers(start, out_rows * width))
    assert source.shape == (out_rows, width)
    assert piece(source, start, stop).tobytes() == expected.reshape(-1)[start:stop].tobytes()


@given(st.permutations(range(11)), st.sampled_from(DTYPES))
def test_a_permutation_then_its_inverse_changes_nothing(order: list[int], dtype: Any) -> None:
    own = array(11, 3, dtype, 3)
    there = RowSource(ArraySource(own), layout(order), {})
    back = RowSource(there, layout(np.argsort(order).tolist()), {})
    assert piece(back, 0, own.size).tobytes() == own.tobytes()
    # ... and on its own it does change something: the comparison can fail.
    moved = order != sorted(order)
    assert (piece(there, 0, own.size).tobytes() != own.tobytes()) == moved


def test_only_the_rows_of_the_piece_are_read_and_neighbors_in_one_go() -> None:
    own = ArraySource(array(1000, 4, np.float32, 4))
    source = RowSource(own, layout([*range(500, 1000), *range(500)]), {})
    piece(source, 10 * 4, 20 * 4)
    assert own.asked == [40]
    own.asked.clear()
    piece(source, 499 * 4 + 1, 501 * 4 - 1)
    assert own.asked == [3, 3]


def test_padding_is_the_mean_of_the_rows_before_it() -> None:
    own = array(7, 3, np.float32, 5)
    source = RowSource(ArraySource(own), layout([3, 2, 1, -1, -1], padding=3), {})
    out = piece(source, 0, 15).reshape(5, 3)
    np.testing.assert_allclose(out[3], own[1:4].mean(0), rtol=0, atol=1e-7)
    assert out[4].tobytes() == out[3].tobytes()


def test_threads_read_the_same_bytes() -> None:
    own = array(64, 8, ml_dtypes.bfloat16, 6)
    order = np.random.default_rng(0).permutation(64).tolist()
    source = RowSource(ArraySource(own), layout([*order, -1, -1], padding=64), {})
    expected = piece(source, 0, 66 * 8).tobytes()
    found: list[bytes] = []
    fresh = RowSource(ArraySource(own), layout([*order, -1, -1], padding=64), {})
    threads = [
        threading.Thread(target=lambda: found.append(piece(fresh, 0, 66 * 8).tobytes())) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 8


def test_a_lent_row_takes_the_dtype_of_the_tensor_it_goes_into() -> None:
    own, lent = array(2, 3, ml_dtypes.bfloat16, 7), array(2, 3, np.float32, 8)
    source = RowSource(ArraySource(own), layout([0, -1], {1: (("b", 1),)}), {"b": ArraySource(lent)})
    assert piece(source, 3, 6).tobytes() == lent[1].astype(ml_dtypes.bfloat16).tobytes()


def test_a_bias_the_lender_lacks_is_zero() -> None:
    own = ArraySource(np.array([1.0, 2.0], np.float32), name="lm_head.bias")
    source = RowSource(own, layout([1, -1], {1: (("b", 5),)}), {"b": None})
    assert piece(source, 0, 2).tolist() == [2.0, 0.0]


@pytest.mark.parametrize(("start", "size"), [(-1, 2), (5, 2)])
def test_a_piece_outside_the_tensor_is_an_error(start: int, size: int) -> None:
    source = RowSource(ArraySource(array(3, 2, np.float32, 9)), layout([2, 1, 0]), {})
    with pytest.raises(ValueError, match="outside tensor"):
        source.read_into(start, np.empty(size, np.float32))
