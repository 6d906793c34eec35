"""Measures: what a part must know of a whole tensor before it acts on a block; masks packed into bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mergelab.operators.order_statistics import RowQuestion

__all__ = [
    "Measure",
    "MeasureScope",
    "PerBlock",
    "Rank",
    "RowOrder",
    "Sum",
    "of_inner",
    "pack_masks",
    "pack_masks_on_host",
    "unpack_mask",
]


def pack_masks(masks: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Bool masks as bits of uint8 arrays of the same shape, eight models to an array."""
    packed = []
    for first in range(0, len(masks), 8):
        word = jnp.zeros_like(masks[first], dtype=jnp.uint8)
        for bit, mask in enumerate(masks[first : first + 8]):
            word = word | (mask.astype(jnp.uint8) << jnp.uint8(bit))
        packed.append(word)
    return tuple(packed)


def pack_masks_on_host(masks: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """The same for numpy arrays; the first mask of each eight becomes their word."""
    packed = []
    for first in range(0, len(masks), 8):
        word = masks[first].view(np.uint8)
        for bit, mask in enumerate(masks[first + 1 : first + 8], start=1):
            word |= mask.view(np.uint8) << np.uint8(bit)
        packed.append(word)
    return tuple(packed)


def unpack_mask(packed: tuple[jax.Array, ...], model: int) -> jax.Array:
    """The bool mask of one model."""
    return (packed[model // 8] >> jnp.uint8(model % 8)) & jnp.uint8(1) == jnp.uint8(1)


MeasureScope = Literal["tensor", "tree"]


@dataclass(frozen=True)
class Sum:
    """Quantities that add over elements, such as norms, Gram matrices and counts.

    Attributes:
        of: `(part, xs, base, region, known) -> pytree` of sums over the block (use `region.total`). Blocks
            are padded with zeros, which must add nothing: count with `region.elements`.
        finish: maps the totals to what the part wants to know; runs once, in the wide dtype.
        scope: `tensor`, or `tree` to add over all tensors of the model.
        needed: `(part, known) -> bool`, asked when earlier measures of the part are known: where the answer
            is no, and under a user's transformation, the measure is not taken and its result is None.
    """

    of: Callable[..., Any]
    finish: Callable[..., Any] = lambda part, totals: totals
    scope: MeasureScope = "tensor"
    needed: Callable[..., bool] | None = None


@dataclass(frozen=True)
class Rank:
    """Exact order statistics: thresholds that keep exactly k elements, ties resolved by lowest index.

    Attributes:
        of: `(part, xs, base, region, known) -> tuple` of uint32 keys `[*block]`, one per stream.
        counts: `(part, known, size, models) -> [streams][ranks]`, how many of the largest keys each
            threshold keeps.
        scope: `tensor`, or `tree` to rank over all tensors of the model together.
        values: whether the part looks at the thresholds themselves, not only at what they keep: the
            threshold that keeps everything is then the smallest key, not a key below all.

    Its result is `[streams][ranks]` of `selection.Selection`.
    """

    of: Callable[..., tuple[jax.Array, ...]]
    counts: Callable[..., Sequence[Sequence[Any]]]
    scope: MeasureScope = "tensor"
    values: bool = False


@dataclass(frozen=True)
class RowOrder:
    """Comparisons of elements with the key at some place in the order of their row (the last axis).

    Attributes:
        of: `(part, xs, base, region, known) -> tuple` of `row_order.RowQuestion`, one per stream.

    Its result is the answers as `masks.pack_masks` packs them, uint8 `[*block]` per eight streams, so it
    belongs to a block, not to the tensor.
    """

    of: Callable[..., tuple[RowQuestion, ...]]


@dataclass(frozen=True)
class PerBlock:
    """Something as large as a block that is used more than once and costly to compute: random masks.

    Attributes:
        of: `(part, xs, base, region, known) -> pytree` of arrays `[*block]`.

    Its result belongs to a block, not to the tensor.
    """

    of: Callable[..., Any]


Measure = Sum | Rank | RowOrder | PerBlock


def of_inner(measure: Measure) -> Measure:
    """An inner part's measure as its wrapper declares it: its functions still receive the inner part."""

    def hide(call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda part, *arguments: call(part.inner, *arguments)

    fields = [f for f in ("of", "finish", "counts", "needed") if getattr(measure, f, None) is not None]
    hidden = {field: hide(getattr(measure, field)) for field in fields}
    return dataclasses.replace(measure, **hidden)
