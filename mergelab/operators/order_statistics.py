"""Exact ranks: the k largest entries of a tensor or tree, and the order within each row."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mergelab.operators.region import Region

__all__ = [
    "RowQuestion",
    "Selection",
    "above_place",
    "above_place_on_host",
    "kept_count",
    "magnitude_key",
    "ordered_key",
    "ordered_value",
    "select_on_device",
    "select_on_host",
    "selected",
    "trivial_selection",
]


_ALL = np.uint32(0xFFFFFFFF)


class Selection(NamedTuple):
    """The k largest keys of a tensor: those above `threshold`, and those equal to it before `cutoff`.

    Attributes:
        threshold: uint32 scalar, the k-th largest key.
        cutoff: uint32 `[2]`, the flat index (high, low word) before which keys equal to it are kept.
    """

    threshold: Any
    cutoff: Any


def magnitude_key(x: jax.Array) -> jax.Array:
    """Maps float32 to uint32 so that keys compare as magnitudes do."""
    return jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0x7FFFFFFF)


def ordered_key(x: jax.Array) -> jax.Array:
    """Maps float32 to uint32 so that keys compare as the signed values do."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    negative = (bits >> jnp.uint32(31)) == jnp.uint32(1)
    return jnp.where(negative, ~bits, bits | jnp.uint32(0x80000000))


def ordered_value(key: jax.Array) -> jax.Array:
    """The float32 whose `ordered_key` this is."""
    positive = (key >> jnp.uint32(31)) == jnp.uint32(1)
    return jax.lax.bitcast_convert_type(jnp.where(positive, key & jnp.uint32(0x7FFFFFFF), ~key), jnp.float32)


def selected(keys: jax.Array, region: Region, selection: Selection) -> jax.Array:
    """Bool `[*block]`: which elements of a block belong to the selection."""
    before = region.before(selection.cutoff)
    return (keys > selection.threshold) | ((keys == selection.threshold) & before)


def kept_count(fraction: Any, size: int, *, at_least: int = 0) -> Any:
    """`int(fraction * size)`, exactly for a Python number; to float32 for a traced one."""
    if isinstance(fraction, Tracer):
        # A decimal such as .7 is slightly off in float32; the nudge keeps whole products whole.
        raw = jnp.floor(jnp.asarray(fraction, jnp.float32) * jnp.float32(size) * jnp.float32(1 + 2.0**-22))
        return jnp.clip(raw, at_least, size).astype(jnp.uint32)
    return min(max(int(float(fraction) * size), at_least), size)


def trivial_selection(count: int, size: int, *, values: bool = False) -> Selection | None:
    """The selection of none or of all elements, which needs no look at the keys; else None.

    The threshold of all is the lowest there can be, not the smallest key: with `values` set it is left open,
    since someone will read it.
    """
    if count <= 0:
        return Selection(_ALL, np.zeros(2, np.uint32))
    if count >= size and not values:
        return Selection(np.uint32(0), np.full(2, _ALL))
    return None


def select_on_host(keys: np.ndarray, count: int) -> Selection:
    """Selects the `count` largest of `keys` (any shape, uint32) with numpy's introselect."""
    flat = keys.reshape(-1)
    if (trivial := trivial_selection(count, flat.size, values=True)) is not None:
        return trivial
    count = min(count, flat.size)
    position = flat.size - count
    threshold = np.partition(flat, position)[position]
    ties = count - int(np.count_nonzero(flat > threshold))
    cutoff = int(np.flatnonzero(flat == threshold)[ties - 1]) + 1
    return Selection(np.uint32(threshold), split_words(cutoff))


def split_words(index: int) -> np.ndarray:
    """uint32 `[2]`: the high and low word of a flat index."""
    return np.array([index >> 32, index & 0xFFFFFFFF], np.uint32)


@jax.jit
def select_on_device(keys: jax.Array, count: jax.Array) -> Selection:
    """The same selection by bisection on key bits, then on index bits.

    Each of its 64 steps only counts, so sharded keys stay where they are and one integer crosses devices;
    it is the traceable form, for arrays of fewer than 2^32 elements.
    """
    _, low = Region(jnp.zeros(2, jnp.uint32), jnp.zeros(2, jnp.uint32), keys.shape).index()
    count = jnp.asarray(count, jnp.uint32)

    def number(mask: jax.Array) -> jax.Array:
        return jnp.sum(mask, dtype=jnp.uint32)

    def key_bit(step: jax.Array, threshold: jax.Array) -> jax.Array:
        candidate = threshold | (jnp.uint32(1) << (jnp.uint32(31) - step.astype(jnp.uint32)))
        return jnp.where(number(keys >= candidate) >= count, candidate, threshold)

    threshold = jax.lax.fori_loop(0, 32, key_bit, jnp.uint32(0))
    ties = count - number(keys > threshold)
    equal = keys == threshold

    def index_bit(step: jax.Array, last: jax.Array) -> jax.Array:
        candidate = last | (jnp.uint32(1) << (jnp.uint32(31) - step.astype(jnp.uint32)))
        return jnp.where(number(equal & (low < candidate)) < ties, candidate, last)

    last = jax.lax.fori_loop(0, 32, index_bit, jnp.uint32(0))
    none = count == jnp.uint32(0)
    threshold = jnp.where(none, jnp.uint32(_ALL), threshold)
    cutoff = jnp.where(none, jnp.uint32(0), last + jnp.uint32(1))
    return Selection(threshold, jnp.stack([jnp.zeros_like(cutoff), cutoff]))


_PIECE = 2**16
"""Elements taken at a time on the host: with all scratch memory about a megabyte."""


class RowQuestion(NamedTuple):
    """A mask: is `mine` above the key at `place` of its row, counted from the smallest?

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
