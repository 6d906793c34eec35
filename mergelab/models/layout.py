"""How a parameter lies inside a tensor of an HF checkpoint: a window, its axes split and reordered.

Every layout is an index map, so a slice of the parameter can be followed back to the places of the file that
hold it. That is what lets a transposed or fused weight be read shard by shard.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import EllipsisType

import numpy as np

__all__ = ["Box", "Layout", "box_shape", "box_size", "normalise", "slices", "whole"]

Box = tuple[tuple[int, int], ...]
"""A slice of an array: the half-open range `(low, high)` taken of each axis."""


def whole(shape: Sequence[int]) -> Box:
    """The box that holds all of an array."""
    return tuple((0, size) for size in shape)


def box_shape(box: Box) -> tuple[int, ...]:
    """The shape of the array that a box cuts out."""
    return tuple(high - low for low, high in box)


def box_size(box: Box) -> int:
    """Number of elements of a box."""
    return math.prod(box_shape(box))


def slices(box: Box) -> tuple[slice | EllipsisType, ...]:
    """The box as an index for numpy; it selects an array even where the box has no axes."""
    return (*(slice(low, high) for low, high in box), ...)


def normalise(index: Sequence[slice], shape: Sequence[int]) -> Box:
    """The box that an index of slices without steps, as shardings give it, takes of an array."""
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


@dataclass(frozen=True)
class Layout:
    """`parameter = stored.reshape(view)[window].transpose(axes).reshape(shape)`.

    Attributes:
        stored_shape: the shape of the HF tensor.
        view: the shape it is seen in, for example its rows split into heads, parts and places in a head.
        window: the part of the view that belongs to the parameter.
        axes: for each axis of the parameter, the axes of the view that it runs over, the last one fastest.
    """

    stored_shape: tuple[int, ...]
    view: tuple[int, ...]
    window: Box
    axes: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        order = sorted(itertools.chain.from_iterable(self.axes))
        inside = all(0 <= low <= high <= n for (low, high), n in zip(self.window, self.view, strict=True))
        if math.prod(self.view) != math.prod(self.stored_shape) or order != [*range(len(self.view))]:
            raise ValueError(
                f"view {self.view} with axes {self.axes} is no view of shape {self.stored_shape}"
            )
        if not inside:
            raise ValueError(f"the window {self.window} leaves the view {self.view}")

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape."""
        sizes = box_shape(self.window)
        return tuple(math.prod(sizes[i] for i in group) for group in self.axes)

    @cached_property
    def order(self) -> tuple[int, ...]:
        """The axes of the view in the order the parameter runs over them."""
        return tuple(itertools.chain.from_iterable(self.axes))

    @cached_property
    def storage_order(self) -> tuple[int, ...]:
        """The parameter's axes in the order the file runs over them."""
        return tuple(sorted(range(len(self.axes)), key=lambda axis: self.axes[axis]))

    def forward(self, stored: np.ndarray) -> np.ndarray:
        """The parameter that a stored tensor holds; a view of it where numpy can give one."""
        window = stored.reshape(self.view)[slices(self.window)]
        return window.transpose(self.order).reshape(self.shape)

    def inverse(self, parameter: np.ndarray, out: np.ndarray) -> None:
        """Puts a parameter into its window of `out`, a contiguous array of the stored shape."""
        out.reshape(self.view)[slices(self.window)] = self.in_view_order(parameter, self.window)

    def in_view_order(self, part: np.ndarray, box: Box) -> np.ndarray:
        """Sees the part of the parameter that came from `box` of the view in the axes of the view.

        The result shares the memory of `part`, which may therefore also be written through it.
        """
        sizes = box_shape(box)
        split = part.reshape([sizes[i] for i in self.order])
        return split.transpose(np.argsort(self.order)) if self.order else split

    def pullback(self, box: Box) -> Iterator[tuple[Box, Box]]:
        """Follows a slice of the parameter back to the stored tensor.

        Yields:
            `(source, target)`: boxes of the view and of the parameter that hold the same elements; the
            targets are disjoint and make up `box`. One pair is enough unless an axis that runs over several
            axes of the view is cut within them.
        """
        sizes = box_shape(self.window)
        cuts = [
            list(_cut(low, high, [sizes[i] for i in group]))
            for (low, high), group in zip(box, self.axes, strict=True)
        ]
        for combination in itertools.product(*cuts):
            ranges = itertools.chain.from_iterable(inner for _, inner in combination)
            source = list(self.window)
            for axis, (low, high) in zip(self.order, ranges, strict=True):
                start = self.window[axis][0]
                source[axis] = (start + low, start + high)
            yield tuple(source), tuple(outer for outer, _ in combination)


def _cut(low: int, high: int, sizes: Sequence[int]) -> Iterator[tuple[tuple[int, int], Box]]:
    """Cuts the range `[low, high)` of a flattened axis into boxes of the axes of `sizes` behind it."""
    if low >= high:
        return
    if not sizes:
        yield (low, high), ()
        return
    inner = math.prod(sizes[1:])
    first, last = -(-low // inner), high // inner
    if first > last:  # inside one step of the outermost axis
        yield from _within(low, high, last, inner, sizes)
        return
    if low < first * inner:
        yield from _within(low, first * inner, first - 1, inner, sizes)
    if first < last:
        yield (first * inner, last * inner), ((first, last), *whole(sizes[1:]))
    if last * inner < high:
        yield from _within(last * inner, high, last, inner, sizes)


def _within(
    low: int, high: int, step: int, inner: int, sizes: Sequence[int]
) -> Iterator[tuple[tuple[int, int], Box]]:
    base = step * inner
    for (begin, end), box in _cut(low - base, high - base, sizes[1:]):
        yield (base + begin, base + end), ((step, step + 1), *box)
