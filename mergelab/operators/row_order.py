"""Looks up the key at a place in each row's order, and compares with it, on devices and on the host."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["RowQuestion", "above_place", "above_place_on_host"]

_PIECE = 2**16
"""Elements taken at a time on the host: with all scratch memory about a megabyte."""


class RowQuestion(NamedTuple):
    """For each element: is `mine` above the key at `place` of its row, counted from the smallest?

    Attributes:
        keys: uint32 `[*block]`, what the rows (along the last axis) are ordered by.
        place: int32 `[*block]`, in `[0, columns)`.
        mine: uint32 `[*block]`; not always the element's own key, so that ties can be settled either way.
    """

    keys: jax.Array | np.ndarray
    place: jax.Array | np.ndarray
    mine: jax.Array | np.ndarray


def above_place(question: RowQuestion) -> jax.Array:
    """Bool `[*block]`: the answers."""
    ascending = jnp.sort(jnp.asarray(question.keys), axis=-1)
    return jnp.asarray(question.mine) > jnp.take_along_axis(ascending, jnp.asarray(question.place), axis=-1)


def above_place_on_host(question: RowQuestion) -> np.ndarray:
    """The same for numpy blocks `[rows, columns]`: numpy sorts 32-bit keys several times as fast as XLA.

    Rows are taken a few at a time, in scratch memory that stays in a core's cache.
    """
    keys, place, mine = map(np.asarray, question)
    rows, columns = keys.shape
    step = max(1, _PIECE // columns)
    answers = np.empty(keys.shape, np.bool_)
    ascending, bound = np.empty((2, step, columns), np.uint32)
    flat = np.empty((step, columns), np.intp)
    starts = (np.arange(step) * columns)[:, None]
    for first in range(0, rows, step):
        piece = slice(first, first + step)
        n = len(keys[piece])
        ascending[:n] = keys[piece]
        ascending[:n].sort(axis=-1)
        np.add(place[piece], starts[:n], out=flat[:n])
        # With a mode other than "raise" numpy writes to `out` directly.
        ascending.reshape(-1).take(flat[:n], out=bound[:n], mode="clip")
        np.greater(mine[piece], bound[:n], out=answers[piece])
    return answers
