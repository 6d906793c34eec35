"""Statistics that a merge may take beside each model: tensors by parameter name, and their shapes."""

from __future__ import annotations

from typing import Literal

__all__ = ["StatisticsKind", "axis_of_kernel", "read_along", "reading_axis", "statistic_fault"]

StatisticsKind = Literal["gram", "merged_gram", "fisher"]
"""`gram`: of a matrix, the mean over tokens of `x x^T` of what it reads, `[in, in]`; `merged_gram`: the same
behind blocks that are merged already; `fisher`: of any tensor, the mean over sequences of each entry's
squared gradient, of the tensor's own shape."""


def reading_axis(shape: tuple[int, ...], side: int, declared: int | None = None) -> int | None:
    """The axis along which a matrix reads inputs of `side` features; None if neither is as long.

    Args:
        shape: the matrix's.
        side: the length of its Gram matrix.
        declared: the axis, where the model's table states it; else the last one, or, where only the first is
            as long, the first.
    """
    axes = (1, 0) if declared is None else (declared,)
    return next((axis for axis in axes if shape[axis] == side), None)


def axis_of_kernel(name: str) -> int | None:
    """The axis that a name declares: a flax `kernel`, [in, out], reads along its first; else None."""
    return 0 if name.rpartition(".")[2] == "kernel" else None


def read_along(
    kind: StatisticsKind, shape: tuple[int, ...], found: tuple[int, ...], declared: int | None
) -> int | None:
    """The axis of a tensor along which it reads: that of its Gram matrix; the declared one of a Fisher's.

    Args:
        kind: what is taken.
        shape: the tensor's shape.
        found: the statistic's shape, which fits.
        declared: same as in `reading_axis`.
    """
    return declared if kind == "fisher" else reading_axis(shape, found[0], declared)


def statistic_fault(
    kind: StatisticsKind, shape: tuple[int, ...], found: tuple[int, ...], declared: int | None = None
) -> str | None:
    """What is wrong with the shape of a tensor's statistic, as the rest of a sentence; None if it fits.

    Args:
        kind: what is taken.
        shape: the tensor's shape.
        found: the statistic's shape.
        declared: same as in `reading_axis`.
    """
    if kind == "fisher":
        if found == shape:
            return None
        return f"is {list(found)}, but a diagonal Fisher has the tensor's own shape {list(shape)}"
    if len(shape) != 2:
        return f"is {list(found)}, but the tensor is {list(shape)}, and only a matrix has a Gram matrix"
    square = len(found) == 2 and found[0] == found[1]
    if square and reading_axis(shape, found[0], declared) is not None:
        return None
    side = shape[1 if declared is None else declared]
    return f"is {list(found)}, but the Gram matrix of a tensor {list(shape)} is [{side}, {side}]"
