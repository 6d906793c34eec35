"""Which tokens an edit changes: given as a mask of a prompt's columns, or as what a generation has made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from mergelab.compat import register_dataclass
from mergelab.errors import SiteError
from mergelab.models.cache import ArrayLeaf

__all__ = ["Columns", "Generated", "Tokens", "chosen_tokens", "in_columns", "select_tokens"]

Tokens = Bool[Array, "batch length"] | np.ndarray | Literal["prompt", "generated"] | None
"""Tokens an edit changes: a mask; those of the prompt, or those a generation adds; all of them if None."""

Columns = Int[Array, "rows length"] | None
"""Columns of tokens, as `TokenPlaces` has them."""
Generated = Bool[Array, "batch length"] | None
"""Tokens that a generation has added, as `TokenPlaces` has them."""


@register_dataclass
@dataclass(frozen=True)
class _Selection:
    """A pytree, so that edits hold it as an argument.

    Attributes:
        mask: bool `[batch, length]`; None where tokens are chosen by their kind.
        kind: that kind.
    """

    mask: ArrayLeaf | None
    kind: str = field(default="", metadata={"static": True})


def select_tokens(where: Tokens) -> _Selection | None:
    """What an edit holds of its argument `where`.

    Raises:
        SiteError: it is a word other than `prompt` and `generated`, or not `[batch, length]`.
    """
    if where is None:
        return None
    if isinstance(where, str):
        if where not in ("prompt", "generated"):
            raise SiteError(f"where is {where!r}; expected a mask, 'prompt' or 'generated'.")
        return _Selection(None, where)
    if np.ndim(where) != 2:
        raise SiteError(
            f"where has shape {list(np.shape(where))}; expected a mask [batch, length] of the tokens to "
            "change."
        )
    return _Selection(jnp.asarray(where, jnp.bool_))


def chosen_tokens(
    selection: _Selection | None, shape: tuple[int, ...], columns: Columns, generated: Generated
) -> Bool[Array, "batch length"] | None:
    """The tokens of an activation of this shape that are changed; None for all.

    In a generation a mask is one of the prompts' columns: it chooses no token that follows them.

    Raises:
        SiteError: a mask is for other prompts.
    """
    if selection is None:
        return None
    if selection.mask is None:
        if generated is None:
            generated = jnp.zeros(shape[:2], jnp.bool_)
        return generated if selection.kind == "generated" else ~generated
    there = in_columns(selection.mask, shape, columns)
    if there is None:
        raise SiteError(
            f"where is a mask of shape {list(selection.mask.shape)} for tokens [batch, length] = "
            f"{list(shape[:2])}; give one value for each token."
        )
    return there[0] & there[1]


def in_columns(
    values: Array, shape: tuple[int, ...], columns: Columns
) -> tuple[Array, Bool[Array, "batch length"]] | None:
    """Values `[batch, length, ...]` of prompts at the tokens of a pass, and which of these have any.

    Args:
        values: one or many per prompt; one length stands for all.
        shape: shape of the activation, `[batch, length, ...]`.
        columns: columns of the pass's tokens; None where it is over the prompts themselves.

    Returns:
        None where the values are for another number of prompts or tokens.
    """
    rows, length = values.shape[:2]
    # Several samples of one prompt follow one another.
    if rows == 0 or shape[0] % rows:
        return None
    if columns is None and length not in (1, shape[1]):
        return None
    values = jnp.repeat(values, shape[0] // rows, axis=0) if rows != shape[0] else values
    if columns is None or length == 1:
        spread = jnp.broadcast_to(values, (*shape[:2], *values.shape[2:]))
        return spread, jnp.ones(shape[:2], jnp.bool_)
    places = jnp.broadcast_to(columns, shape[:2])
    index = jnp.clip(places, 0, length - 1).reshape(*shape[:2], *[1] * (values.ndim - 2))
    return jnp.take_along_axis(values, index, axis=1), (places >= 0) & (places < length)
