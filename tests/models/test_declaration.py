"""Laws of the declaration: transforms invert, pullbacks find every element, tables cover each tensor once."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergelab.models.layout import Box, Layout, box_size, slices, whole
from mergelab.models.table import (
    Fused,
    FusedHeads,
    Leaf,
    Transform,
    check_table,
    stored_shapes,
)

SIZES = st.integers(1, 5)


@st.composite
def rows(draw: st.DrawFn) -> dict[str, Any]:
    """Any row: every transform, one to three axes, with and without a stack; sizes may be zero.

    Arguments of `Leaf`, which the test makes: checking its types draws random numbers, as strategies may not.
    """
    kind = draw(st.sampled_from(["identity", "transpose", "fused", "heads"]))
    outer = tuple(draw(st.lists(st.integers(0, 4), max_size=2)))
    width = draw(SIZES)
    transform: Transform = kind  # type: ignore[assignment]
    if kind == "fused":
        start, rest = draw(st.integers(0, 4)), draw(st.integers(0, 4))
        groups = draw(st.integers(1, 3))
        transform = Fused(start, start + width + rest, draw(st.booleans()), groups)
        width *= groups
    elif kind == "heads":
        heads, parts = draw(SIZES), draw(SIZES)
        width *= heads
        transform = FusedHeads(draw(st.integers(0, parts - 1)), parts, heads, draw(st.booleans()))
    stack = draw(st.integers(0, 3))
    shape = (*([stack] if stack else []), *outer, width)
    name = "x.{}" if stack else "x"
    return {"path": ("x",), "hf_name": name, "shape": shape, "transform": transform, "stack": stack}


def boxes(shape: tuple[int, ...]) -> st.SearchStrategy[Box]:
    ends = [st.tuples(st.integers(0, n), st.integers(0, n)).map(lambda ab: tuple(sorted(ab))) for n in shape]
    return st.tuples(*ends)  # type: ignore[return-value]


def stored(leaf: Leaf) -> list[np.ndarray]:
    """Tensors in which every element has a value of its own."""
    size = math.prod(leaf.hf_shape)
    return [1 + size * n + np.arange(size).reshape(leaf.hf_shape) for n in range(len(leaf.hf_names))]


def from_pieces(leaf: Leaf, box: Box, tensors: dict[str, np.ndarray]) -> np.ndarray:
    """The leaf with `box` filled through its pullback, and zeros elsewhere."""
    out = np.zeros(leaf.shape, int)
    filled = 0
    for name, source, target in leaf.pullback(box):
        part = out[slices(target)]
        seen = leaf.layout.in_view_order(part[0] if leaf.stack else part, source)
        assert np.shares_memory(seen, out) or not seen.size
        assert not seen.any(), "two pieces have one target"
        seen[...] = tensors[name].reshape(leaf.layout.view)[slices(source)]
        filled += box_size(target)
    assert filled == box_size(box)
    return out


@given(rows(), st.data())
def test_a_slice_through_the_pullback_is_the_slice_of_the_whole(row: dict[str, Any], data: Any) -> None:
    leaf = Leaf(**row)
    box = data.draw(boxes(leaf.shape))
    tensors = stored(leaf)
    expected = np.zeros(leaf.shape, int)
    expected[slices(box)] = leaf.forward(tensors)[slices(box)]
    found = from_pieces(leaf, box, dict(zip(leaf.hf_names, tensors, strict=True)))
    np.testing.assert_array_equal(found, expected)


@given(rows())
def test_inverse_undoes_forward(row: dict[str, Any]) -> None:
    leaf = Leaf(**row)
    tensors = stored(leaf)
    back = [np.zeros_like(tensor) for tensor in tensors]
    leaf.inverse(leaf.forward(tensors), back)
    for tensor, again in zip(tensors, back, strict=True):
        assert np.count_nonzero(again) == leaf.size // len(tensors)
        np.testing.assert_array_equal(again[again != 0], tensor[again != 0])
    np.testing.assert_array_equal(leaf.forward(back), leaf.forward(tensors))


def test_transforms_are_what_their_names_say() -> None:
    linear = np.arange(12).reshape(6, 2)  # [out, in]
    vector = np.arange(6)
    kernel = Leaf(("w",), "w", (2, 6), "transpose").forward([linear])
    np.testing.assert_array_equal(kernel, linear.T)
    np.testing.assert_array_equal(Leaf(("w",), "w", (2, 3), Fused(1, 6)).forward([linear]), linear[1:4].T)
    np.testing.assert_array_equal(
        Leaf(("w",), "w", (6, 1), Fused(1, 2, transposed=False)).forward([linear]), linear[:, 1:]
    )
    np.testing.assert_array_equal(Leaf(("b",), "b", (2,), Fused(4, 6)).forward([vector]), vector[4:])
    part = [1, 4]  # part 1 of 3 of each of two heads of width 1
    np.testing.assert_array_equal(
        Leaf(("w",), "w", (2, 2), FusedHeads(1, 3, 2)).forward([linear]), linear[part].T
    )
    np.testing.assert_array_equal(
        Leaf(("b",), "b", (2,), FusedHeads(1, 3, 2)).forward([vector]), vector[part]
    )
    experts = Leaf(("w",), "e.{}.w", (3, 2, 6), "transpose", stack=3)
    assert experts.hf_names == ("e.0.w", "e.1.w", "e.2.w")
    np.testing.assert_array_equal(
        experts.forward([linear, linear + 1, linear + 2]), np.stack([linear.T, linear.T + 1, linear.T + 2])
    )


def test_the_pullback_of_a_plain_slice_is_one_piece() -> None:
    kernel = Leaf(("w",), "w", (8, 6), "transpose")
    assert list(kernel.pullback(((2, 4), (0, 3)))) == [("w", ((0, 3), (2, 4)), ((2, 4), (0, 3)))]
    value = Leaf(("v",), "qkv", (8, 6), FusedHeads(2, 3, 3))
    assert [piece.source for piece in value.pullback(((0, 8), (2, 6)))] == [((1, 3), (2, 3), (0, 2), (0, 8))]
    cut = [piece.target[1] for piece in value.pullback(((0, 8), (1, 5)))]
    assert cut == [(1, 2), (2, 4), (4, 5)]


def table(**changes: Any) -> list[Leaf]:
    q, k, v = (
        Leaf((n,), "qkv", (4, 6), FusedHeads(i, 3, 3), ("embed", "heads")) for i, n in enumerate("qkv")
    )
    norm = Leaf(("norm",), "norm", (4,))
    return [q, k, changes.get("v", v), norm]


def test_a_table_uses_every_element_once() -> None:
    check_table(table())
    assert stored_shapes(table()) == {"qkv": (18, 4), "norm": (4,)}
    wrong = {
        "'qkv' has elements": table(v=Leaf(("v",), "qkv", (4, 6), FusedHeads(1, 3, 3))),
        "stands twice": [*table(), Leaf(("norm",), "other", (4,))],
        "to one leaf": table(v=Leaf(("v",), "qkv", (4, 6), "transpose")),
    }
    for message, leaves in wrong.items():
        with pytest.raises(ValueError, match=message):
            check_table(leaves)


def test_rows_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(ValueError, match="do not name the axes"):
        Leaf(("w",), "w", (2, 3), axes=("embed",))
    with pytest.raises(ValueError, match="does not stack"):
        Leaf(("w",), "w", (2, 3), stack=2)
    with pytest.raises(ValueError, match="does not fit"):
        Leaf(("w",), "w", (2, 7), FusedHeads(0, 3, 2))
    with pytest.raises(ValueError, match="leaves the view"):
        Leaf(("w",), "w", (2, 3), Fused(4, 6))
    with pytest.raises(ValueError, match="not a view"):
        Layout((6,), (2, 2), whole((2, 2)), ((0,), (1,)))
