"""Which of several models the others descend from, by their weights; and whether a given base is one.

Task vectors of models that were trained apart from one base are nearly at right angles; seen from a sibling,
they all contain that sibling's own task vector turned round, and their cosines are near 1/2. Of two models
alone, training adds a change that is at right angles to the base it began from: `d.b = 0` from the base `b`,
and `-d.d` the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from mergelab.merging.diff.block_sums import Sums

__all__ = ["KIN", "Descent", "find_base"]

KIN = 0.25
"""Least cosine of the weights of two models of one origin: fine-tunes have 0.9 and more, strangers 0."""

_APART = 0.3
_SHARED = 0.45
_MARGIN = 0.1
_SURE = 0.25
_LIKELY = 0.4


@dataclass(frozen=True)
class Descent:
    """What weights say of the base.

    Attributes:
        base: Name of the base; None where no model looks like it.
        given: Whether the caller named it.
        reasons: Sentences that say why, one each.
        doubts: Sentences that speak against the base that was given.
        strangers: Pairs of models whose weights have nothing in common.
    """

    base: str | None
    given: bool
    reasons: tuple[str, ...]
    doubts: tuple[str, ...] = ()
    strangers: tuple[tuple[str, str], ...] = ()


def find_base(
    names: Sequence[str], sums: Sequence[Sums], reference: int, given: str | None = None
) -> Descent:
    """Finds the base among models, or checks the one that is given.

    Args:
        names: Name of each model.
        sums: Sums of matrices of layers, whose changes are from the model at `reference`; of a part of them
            or of all.
        reference: Index of the model that changes are from.
        given: Name of the model that is said to be the base.
    """
    squares, inner = _geometry(sums, len(names), reference)
    cosines = inner / np.sqrt(np.maximum(np.outer(np.diag(inner), np.diag(inner)), 1e-300))
    strangers = tuple(
        (names[i], names[j]) for i, j in combinations(range(len(names)), 2) if cosines[i, j] < KIN
    )
    if given is not None:
        return _checked(names, squares, names.index(given), strangers)
    if not len(sums):
        return Descent(None, False, ("there is no matrix of a layer to judge by",))
    if strangers:
        said = f"the weights of {strangers[0][0]!r} and {strangers[0][1]!r} have nothing in common"
        return Descent(None, False, (said,), (), strangers)
    if len(names) == 2:
        return _of_two(names, sums, reference)
    return _of_many(names, squares, sums, reference)


def _geometry(sums: Sequence[Sums], models: int, reference: int) -> tuple[np.ndarray, np.ndarray]:
    """Squared distances and inner products of the models, each tensor by its number of entries."""
    order = [reference, *(i for i in range(models) if i != reference)]
    distances, products = np.zeros((2, models, models))
    for each in sums:
        gram = each.gram[:models, :models]
        size = float(gram[0, 0])
        if not np.isfinite(gram).all() or size <= 0:
            continue
        shifts = gram.copy()
        shifts[0, :] = shifts[:, 0] = 0
        lengths = np.diag(shifts)
        distance = np.maximum(lengths[:, None] + lengths[None] - 2 * shifts, 0)
        along = gram[0].copy()
        along[0] = 0
        product = size + along[:, None] + along[None] + shifts
        at = np.ix_(order, order)
        distances[at] += each.count * distance / size
        products[at] += each.count * product / size
    return distances, products


def _angles(squares: np.ndarray, center: int) -> list[float]:
    """Cosines between the changes of the other models from the one at `center`."""
    others = [i for i in range(len(squares)) if i != center and squares[i, center] > 0]
    return [
        float(
            (squares[i, center] + squares[j, center] - squares[i, j])
            / (2 * math.sqrt(squares[i, center] * squares[j, center]))
        )
        for i, j in combinations(others, 2)
    ]


def _slope(sums: Sequence[Sums], models: int, reference: int, base: int, other: int) -> tuple[float, float]:
    """How far the change from `base` to `other` lies along `base`, over its own square; and twice its error.

    0 where training began from `base`, -1 where it ended there.
    """
    order = [reference, *(i for i in range(models) if i != reference)]
    p, q = order.index(base), order.index(other)
    along, squares = [], []
    for each in sums:
        gram = each.gram[:models, :models]
        if not np.isfinite(gram).all() or gram[0, 0] <= 0:
            continue
        shift = gram.copy()
        shift[0], shift[:, 0] = 0, 0
        # Larger tensors say it more exactly, by the square root of their size.
        weight = each.count / gram[0, 0]
        grown = (2 * gram[0, q] if q else 0) + shift[q, q] - (2 * gram[0, p] if p else 0) - shift[p, p]
        square = shift[p, p] + shift[q, q] - 2 * shift[p, q]
        along.append(weight * (grown - square) / 2)  # |b|^2 = |a|^2 + 2 d.a + d.d
        squares.append(weight * square)
    total = float(np.sum(squares))
    if not total > 0:
        return 0.0, math.inf
    slope = float(np.sum(along)) / total
    return slope, 2 * float(np.sqrt(np.square(np.array(along) - slope * np.array(squares)).sum())) / total


def _of_many(names: Sequence[str], squares: np.ndarray, sums: Sequence[Sums], reference: int) -> Descent:
    scores: list[float] = []
    for i in range(len(names)):
        found = _angles(squares, i)
        scores.append(float(np.mean(np.abs(found))) if found else math.inf)
    order = np.argsort(scores)
    best, second = int(order[0]), int(order[1])
    before: list[str] = []
    for i in range(len(names)):
        slope, doubt = _slope(sums, len(names), reference, best, i) if i != best else (0.0, math.inf)
        if abs(slope + 1) < _LIKELY and doubt < _LIKELY:
            before.append(names[i])
    if before and scores[best] < _APART:
        said = (
            f"{names[best]!r} lies between the others, but the change from {before[0]!r} to it is at right "
            f"angles to {before[0]!r}, which came first: it is tuned, or a merge"
        )
        return Descent(None, False, (said,))
    if scores[best] < _APART and scores[second] > scores[best] + _MARGIN:
        return Descent(
            names[best],
            False,
            (
                f"seen from {names[best]!r} the changes of the others are nearly at right angles (mean "
                f"|cosine| {scores[best]:.2f}), seen from {names[second]!r} they share a direction "
                f"({_shown(scores[second])}): siblings look like that from their base alone",
            ),
        )
    return Descent(
        None,
        False,
        (
            "from every model the changes of the others share a direction (least mean |cosine| "
            f"{_shown(scores[best])}, from {names[best]!r}; from their base siblings show less than "
            f"{_APART:g}): "
            "the base is none of them, or some are merges of others",
        ),
    )


def _shown(score: float) -> str:
    return f"{score:.2f}" if math.isfinite(score) else "not defined"


def _of_two(names: Sequence[str], sums: Sequence[Sums], reference: int) -> Descent:
    other = 1 - reference
    slope, doubt = _slope(sums, 2, reference, reference, other)
    if math.isinf(doubt):
        return Descent(None, False, ("the matrices of both models are equal",))
    seen = (
        f"the change projected on {names[reference]!r} is {slope:.2f} +- {doubt:.2f} of its own square (0 "
        "from the base, -1 from the model that was tuned)"
    )
    if doubt < _SURE and abs(slope) < _SURE:
        return Descent(names[reference], False, (seen,))
    if doubt < _SURE and abs(slope + 1) < _SURE:
        return Descent(names[other], False, (seen,))
    return Descent(
        None, False, (f"two models alone do not tell which came first: {seen}; name it with --base",)
    )


def _checked(
    names: Sequence[str], squares: np.ndarray, base: int, strangers: tuple[tuple[str, str], ...]
) -> Descent:
    doubts = [
        f"the weights of {a!r} and {b!r} have nothing in common (cosine below {KIN:g}): take the model that "
        "it was tuned from"
        for a, b in strangers
        if names[base] in (a, b)
    ]
    reasons: list[str] = []
    related = not any(names[base] in pair for pair in strangers)
    if len(names) > 2 and related and (found := _angles(squares, base)):
        mean = float(np.mean(found))
        if mean > _SHARED:
            doubts.append(
                f"seen from {names[base]!r} the changes of the other models share a direction (mean cosine "
                f"{mean:.2f}; from the base that siblings were tuned from it is near 0): it is an earlier "
                "ancestor, or a sibling; take the model they were all tuned from"
            )
        else:
            reasons.append(
                f"seen from {names[base]!r} the changes of the others are apart (mean cosine {mean:.2f})"
            )
        if min(found) < -_SHARED:
            doubts.append(
                f"{names[base]!r} lies between other models, as their average does (cosine "
                f"{min(found):.2f} of two changes from it): take the model they were tuned from"
            )
    return Descent(names[base], True, tuple(reasons), tuple(doubts), strangers)
