"""Boxes inside a stored tensor: which slices of files make up a slice of a parameter."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import EllipsisType
from typing import Any, TypeVar

import numpy as np

__all__ = [
    "Box",
    "Layout",
    "blocks",
    "box_shape",
    "box_size",
    "intersection",
    "join",
    "normalize",
    "relative",
    "runs",
    "slices",
    "whole",
    "widen",
]


Box = tuple[tuple[int, int], ...]
"""A slice of an array: the half-open range `(low, high)` taken of each axis."""

AnyArray = TypeVar("AnyArray", bound=Any)
"""An array of numpy or of jax."""


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


def normalize(index: Sequence[slice], shape: Sequence[int]) -> Box:
    """The box that an index of slices without steps, as shardings give it, takes of an array."""
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


@dataclass(frozen=True)
class Layout:
    """`parameter = stored.reshape(view)[window].transpose(axes).reshape(shape)`.

    Attributes:
        stored_shape: the shape of the HF tensor.
        view: the shape it is seen in, for example its rows split into heads, parts and places in a head.
        window: the part of the view that belongs to the parameter.
        axes: one entry for each axis of the parameter, the axes of the view that it runs over, the last one
            fastest.
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
                f"view {self.view} with axes {self.axes} is not a view of shape {self.stored_shape}"
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

    def forward(self, stored: AnyArray) -> AnyArray:
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


_PAGE = 4096


def intersection(a: Box, b: Box) -> Box | None:
    """What two boxes share; None if nothing."""
    shared = tuple((max(p[0], q[0]), min(p[1], q[1])) for p, q in zip(a, b, strict=True))
    return shared if all(low < high for low, high in shared) else None


def relative(box: Box, origin: Box) -> Box:
    """A box counted from the first corner of another one that contains it."""
    return tuple((low - first, high - first) for (low, high), (first, _) in zip(box, origin, strict=True))


def join(boxes: Iterable[Box]) -> list[Box]:
    """Replaces disjoint boxes by the one box they fill, if they fill one."""
    parts = list(dict.fromkeys(boxes))
    if len(parts) < 2:
        return parts
    hull = tuple(
        (min(low for low, _ in ends), max(high for _, high in ends)) for ends in zip(*parts, strict=True)
    )
    return [hull] if box_size(hull) == sum(map(box_size, parts)) else parts


def blocks(box: Box, limit: int) -> Iterator[Box]:
    """Cuts a box, in row-major order, into boxes of at most `limit` elements."""
    if box_size(box) <= max(limit, 1):
        yield box
        return
    axis = next(i for i, (low, high) in enumerate(box) if high - low > 1)
    low, high = box[axis]
    step = max(1, limit // math.prod(box_shape(box[axis + 1 :])))
    for start in range(low, high, step):
        yield from blocks((*box[:axis], (start, min(start + step, high)), *box[axis + 1 :]), limit)


def widen(view: Sequence[int], box: Box, itemsize: int) -> Box:
    """Takes in gaps between the runs of a box that are shorter than a page, which is read as a whole anyway.

    The box returned contains `box`.
    """
    wide = list(box)
    for axis in range(len(view) - 1, 0, -1):
        low, high = wide[axis]
        if (low, high) == (0, view[axis]):
            continue
        gap = (view[axis] - (high - low)) * math.prod(view[axis + 1 :]) * itemsize
        if gap >= _PAGE or box_size(tuple(wide[:axis])) < 2:
            break
        wide[axis] = (0, view[axis])
    return tuple(wide)


def runs(view: Sequence[int], box: Box) -> tuple[np.ndarray, int]:
    """The runs of consecutive elements that make up a box of a row-major array of shape `view`.

    Returns:
        The first element of each run, int64, ascending; and their common length.
    """
    axis = len(view)
    while axis > 0 and box[axis - 1] == (0, view[axis - 1]):
        axis -= 1
    axis = max(axis - 1, 0)  # the last axis that is cut is part of the run
    strides = [math.prod(view[i + 1 :]) for i in range(len(view))]
    starts = np.full(
        1, sum(low * stride for (low, _), stride in zip(box[axis:], strides[axis:], strict=True))
    )
    for (low, high), stride in zip(reversed(box[:axis]), reversed(strides[:axis]), strict=True):
        starts = (np.arange(low, high)[:, None] * stride + starts[None, :]).reshape(-1)
    return starts.astype(np.int64), box_size(box[axis:])
