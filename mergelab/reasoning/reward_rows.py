"""What a reward model learns from: texts with a label, steps with one each, or pairs of texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mergelab.errors import TuningError

__all__ = ["RewardRows", "outcome_rows", "pair_rows", "process_rows", "require_rows"]


@dataclass(frozen=True)
class RewardRows:
    """What a reward model learns from; made by `outcome_rows`, `process_rows` or `pair_rows`.

    Attributes:
        tokens: int32 `[rows, length]`, or `[rows, 2, length]` of pairs, what is preferred first.
        mask: True for real tokens, of the same shape.
        targets: int32 `[rows, length]`, label of each token; unused of pairs.
        counted: bool `[rows, length]`, the tokens that have one.
    """

    tokens: np.ndarray
    mask: np.ndarray
    targets: np.ndarray
    counted: np.ndarray

    @property
    def pairs(self) -> bool:
        """Whether rows are pairs."""
        return self.tokens.ndim == 3


def outcome_rows(tokens: Any, labels: Any, mask: Any = None) -> RewardRows:
    """Texts with one label each: right or wrong, or a class.

    Args:
        tokens: int `[rows, length]`.
        labels: bool or int `[rows]`.
        mask: True for real tokens.

    Raises:
        TuningError: the shapes differ.
    """
    ids, real = _texts(tokens, mask, 2)
    said = np.asarray(labels).astype(np.int32)
    require_rows(said.shape == ids.shape[:1], f"labels of shape {list(said.shape)}", f"[{len(ids)}]")
    columns = np.arange(ids.shape[1])[None]
    last = ids.shape[1] - 1 - np.argmax(real[:, ::-1], axis=1)
    counted = columns == last[:, None]
    return RewardRows(ids, real, np.where(counted, said[:, None], 0).astype(np.int32), counted)


def process_rows(tokens: Any, ends: Any, labels: Any, mask: Any = None) -> RewardRows:
    """Texts with a label at the token that ends each step.

    Args:
        tokens: int `[rows, length]`.
        ends: columns of those tokens, int `[steps]` or `[rows, steps]`; -1 where a row has fewer steps.
        labels: bool or int `[rows, steps]`.
        mask: True for real tokens.

    Raises:
        TuningError: the shapes differ, or a column is beyond the text.
    """
    ids, real = _texts(tokens, mask, 2)
    said = np.asarray(labels).astype(np.int32)
    require_rows(
        said.ndim == 2 and len(said) == len(ids), f"labels of shape {list(said.shape)}", "[rows, steps]"
    )
    places = np.asarray(ends)
    places = np.broadcast_to(places, said.shape) if places.ndim == 1 else places
    inside = places.shape == said.shape and bool(((places >= -1) & (places < ids.shape[1])).all())
    require_rows(inside, f"ends {places.tolist()[:2]}", f"columns below {ids.shape[1]}, one for each label")
    targets, counted = np.zeros(ids.shape, np.int32), np.zeros(ids.shape, bool)
    rows, steps = np.nonzero(places >= 0)
    targets[rows, places[rows, steps]] = said[rows, steps]
    counted[rows, places[rows, steps]] = True
    return RewardRows(ids, real, targets, counted & real)


def pair_rows(preferred: Any, others: Any, masks: tuple[Any, Any] = (None, None)) -> RewardRows:
    """Pairs of texts, of which the first is better; both are `[rows, length]`, with their masks.

    Raises:
        TuningError: the shapes differ.
    """
    first, second = _texts(preferred, masks[0], 2), _texts(others, masks[1], 2)
    require_rows(
        first[0].shape == second[0].shape,
        f"pairs of shapes {list(first[0].shape)} and {list(second[0].shape)}",
        "one shape",
    )
    ids, real = (np.stack(both, axis=1) for both in zip(first, second, strict=True))
    nothing = np.zeros((len(ids), ids.shape[2]), bool)
    return RewardRows(ids, real, nothing.astype(np.int32), nothing)


def _texts(tokens: Any, mask: Any, rank: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.asarray(tokens)
    real = np.ones(ids.shape, bool) if mask is None else np.asarray(mask, bool)
    whole = ids.ndim == rank and ids.size > 0 and ids.dtype.kind in "iu" and real.shape == ids.shape
    require_rows(
        whole, f"tokens {ids.dtype} {list(ids.shape)} with a mask {list(real.shape)}", "ids [rows, length]"
    )
    require_rows(bool(real.any(axis=-1).all()), "a row without a real token", "at least one in each")
    return ids.astype(np.int32), real


def require_rows(holds: bool, found: str, expected: str) -> None:
    """Checks what rewards are learned from.

    Raises:
        TuningError: it does not hold.
    """
    if not holds:
        raise TuningError(f"there are {found} to learn rewards from, but expected {expected}.")
