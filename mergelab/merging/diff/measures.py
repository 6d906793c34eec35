"""Numbers of a tensor, a layer or a whole model from its sums: relative changes, norms, cosines."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from mergelab.merging.diff.block_sums import Sums

__all__ = ["Relation", "Relations", "TaskVector", "added", "relations_of"]


@dataclass(frozen=True)
class Relation:
    """One model against another; None where the numbers are not finite or not defined.

    Attributes:
        model, other: Names of `A` and `B`.
        relative_change: `|A - B| / |B|`.
        cosine: Cosine of `A` and `B` as vectors.
        angle: The angle between them in degrees: exact where the cosine rounds to 1.
        norm, other_norm: `|A|` and `|B|`.
        norm_ratio: `|A| / |B|`.
    """

    model: str
    other: str
    relative_change: float | None
    cosine: float | None
    angle: float | None
    norm: float | None
    other_norm: float | None
    norm_ratio: float | None


@dataclass(frozen=True)
class TaskVector:
    """A model less the base.

    Attributes:
        model: The model's name.
        norm: Norm of the task vector.
        relative: That over the norm of the base; None where the base is zero.
        unchanged: Fraction of entries that equal the base's.
    """

    model: str
    norm: float | None
    relative: float | None
    unchanged: float


@dataclass(frozen=True)
class Relations:
    """All that the sums of one tensor, or of several together, say.

    Attributes:
        entries: Number of entries.
        pairs: Relations of the first model to the second, and of each further pair.
        tasks: Task vectors, where there is a base.
        task_cosines: Cosines of the task vectors of each pair of models.
        unchanged: Fraction of entries in which the first two models are equal.
        small: Fraction of entries that differ by less than 1e-3 between them.
        nonfinite: Number of NaN and infinite entries of each model that has any.
    """

    entries: int
    pairs: tuple[Relation, ...]
    tasks: tuple[TaskVector, ...]
    task_cosines: tuple[tuple[str, str, float | None], ...]
    unchanged: float
    small: float
    nonfinite: dict[str, int]

    @property
    def first(self) -> Relation:
        """The first model against the second."""
        return self.pairs[0]

    @property
    def equal(self) -> bool:
        """Whether the first two models have the same values."""
        return self.unchanged == 1


def added(sums: Iterable[Sums]) -> Sums:
    """The sums of several tensors together; norms of rows are omitted."""
    every = list(sums)
    vectors = every[0].gram.shape[0]
    return Sums(
        sum(each.count for each in every),
        np.sum([each.gram for each in every], axis=0),
        np.sum([each.unchanged for each in every], axis=0),
        np.sum([each.small for each in every], axis=0),
        np.sum([each.nonfinite for each in every], axis=0),
        np.zeros((vectors, 0)),
    )


def relations_of(sums: Sums, names: Sequence[str], reference: int, *, has_base: bool) -> Relations:
    """What the sums say of models called `names`.

    Args:
        sums: Sums whose changes are from the model at `reference`.
        names: Name of each model.
        reference: Index of the model that changes are from.
        has_base: Whether that one is the base of the others.
    """
    others = [i for i in range(len(names)) if i != reference]
    place = {reference: 0, **{i: n for n, i in enumerate(others, 1)}}
    direct = len(sums.gram) > len(names)
    pairs = tuple(
        _relation(sums.gram, names, place, i, j, direct=direct and (i, j) == (0, 1))
        for i, j in combinations(range(len(names)), 2)
    )
    between = len(sums.gram) - 1 if direct else place[0] or place[1]
    count = max(sums.count, 1)
    tasks: list[TaskVector] = []
    cosines: list[tuple[str, str, float | None]] = []
    if has_base:
        size = _root(sums.gram[0, 0])
        for i in others:
            norm = _root(sums.gram[place[i], place[i]])
            same = float(sums.unchanged[place[i]]) / count if sums.count else 1.0
            tasks.append(TaskVector(names[i], norm, _ratio(norm, size), same))
        for i, j in combinations(others, 2):
            p, q = place[i], place[j]
            dot = float(sums.gram[p, q])
            cosines.append((names[i], names[j], _cosine(dot, sums.gram[p, p], sums.gram[q, q])))
    return Relations(
        sums.count,
        pairs,
        tuple(tasks),
        tuple(cosines),
        float(sums.unchanged[between]) / count if sums.count else 1.0,
        float(sums.small[between]) / count if sums.count else 1.0,
        {names[i]: int(found) for i, found in enumerate(sums.nonfinite) if found},
    )


def _relation(
    gram: np.ndarray, names: Sequence[str], place: dict[int, int], i: int, j: int, *, direct: bool
) -> Relation:
    """Model `i` against model `j`: `a.a = r.r + 2 r.d + d.d` of each, d its change from the reference."""
    p, q = place[i], place[j]
    grown, other_grown = (2 * float(gram[0, k]) + float(gram[k, k]) if k else 0.0 for k in (p, q))
    a, b = (_root(float(gram[0, 0]) + more) for more in (grown, other_grown))
    if direct:
        square, apart = float(gram[-1, -1]), float(gram[-1, -1] + 2 * (gram[-1, 0] + gram[-1, q]))
    else:
        shared = 2 * float(gram[p, q]) if p and q else 0.0
        square, apart = sum(float(gram[k, k]) for k in (p, q) if k) - shared, grown - other_grown
    d = _root(square)
    cosine = angle = None
    if a is not None and b is not None and d is not None and a * b > 0:
        # 2 |a| |b| (1 - cos) = |a - b|^2 - (|a| - |b|)^2 does not cancel where a and b are close.
        lag = apart / (a + b)
        half = min(max((d - abs(lag)) * (d + abs(lag)) / (4 * a * b), 0.0), 1.0)  # sin^2 of half the angle
        cosine, angle = 1 - 2 * half, math.degrees(2 * math.asin(math.sqrt(half)))
    return Relation(names[i], names[j], _ratio(d, b), cosine, angle, a, b, _ratio(a, b))


def _root(square: float) -> float | None:
    """None for what is not finite; what rounding made negative is 0."""
    return math.sqrt(max(square, 0.0)) if abs(square) < math.inf else None


def _ratio(x: float | None, y: float | None) -> float | None:
    if x is None or y is None:
        return None
    return x / y if y > 0 else (0.0 if x == 0 else None)


def _cosine(dot: float, xx: float, yy: float) -> float | None:
    norms = math.sqrt(xx * yy) if xx >= 0 and yy >= 0 else math.nan
    return max(-1.0, min(1.0, dot / norms)) if 0 < norms < math.inf else None
