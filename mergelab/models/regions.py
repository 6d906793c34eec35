"""Boxes of stored tensors: how they are cut into blocks that fit a buffer and runs that lie together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from mergelab.models.layout import Box, box_shape, box_size

__all__ = ["blocks", "intersection", "join", "relative", "runs", "widen"]

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
