"""The one padding and the one batching: prompts in one shape, a fixed number at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mergelab.errors import DecodingError, SiteError, TokenError

__all__ = [
    "batches",
    "bucket_size",
    "check_prompts",
    "filled_batches",
    "map_pieces",
    "pad_prompts",
    "stack_prompts",
    "widen",
]


_SMALLEST = 16


def bucket_size(length: int) -> int:
    """The least of 16, 24, 32, 48, 64, 96, ... that is at least `length`: two sizes to an octave.

    >>> [bucket_size(n) for n in (1, 16, 17, 25, 33, 64, 65)]
    [16, 16, 24, 32, 48, 64, 96]
    """
    power = _SMALLEST
    while power < length:
        if power + power // 2 >= length:
            return power + power // 2
        power *= 2
    return power


def _require(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise DecodingError(f"{name} was given {value!r}, but needs {expected}.")


def pad_prompts(prompts: Sequence[Sequence[int]], pad_id: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Stacks prompts, padded on the left: their last tokens meet in the last column.

    Args:
        prompts: token ids, at least one each.
        pad_id: fills up; never looked at, but has to be an id of the vocabulary.

    Returns:
        Tokens int32 `[batch, length]`, and the mask, bool, True for real tokens.

    Raises:
        DecodingError: there is no prompt, or an empty one (give it the token that begins a text).
    """
    _require("pad_prompts", prompts, len(prompts) > 0, "at least one prompt")
    for prompt in prompts:
        _require("pad_prompts", prompt, len(prompt) > 0, "prompts of at least one token")
    length = max(map(len, prompts))
    tokens = np.full((len(prompts), length), pad_id, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[length - len(prompt) :] = prompt
    lengths = np.array([[len(prompt)] for prompt in prompts])
    return tokens, np.arange(length)[None] >= length - lengths


def widen(tokens: np.ndarray, mask: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Adds padding on the left up to `length` columns."""
    more = ((0, 0), (length - tokens.shape[1], 0))
    # The first column's ids are as good a filler as any: they are in the vocabulary.
    return np.pad(tokens, more, mode="edge"), np.pad(mask, more)


def check_prompts(tokens: np.ndarray, mask: np.ndarray, vocab_size: int) -> None:
    """Refuses what cannot be continued.

    Raises:
        DecodingError: wrong shapes, padding elsewhere than on the left, an empty row, or an unknown id.
    """
    shapes = f"{tokens.shape} and {mask.shape}"
    two = tokens.ndim == 2 and tokens.size > 0
    _require("generate(tokens, mask)", shapes, two and tokens.shape == mask.shape, "equal [batch, length]")
    left = bool(mask[:, -1].all() and (np.diff(mask.astype(np.int8), axis=1) >= 0).all())
    _require("generate(mask)", mask.tolist()[:4], left, "padding on the left only, and no empty row")
    low, high = int(tokens.min()), int(tokens.max())
    expected = f"token ids below the vocabulary's {vocab_size}"
    _require("generate(tokens)", f"ids from {low} to {high}", low >= 0 and high < vocab_size, expected)


def stack_prompts(tokens: Any, mask: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """Prompts in any of the usual forms as one array `[prompts, length]`, and its mask, True for real tokens.

    >>> stack_prompts([[5, 6, 7], [8]])[0].tolist()
    [[5, 6, 7], [0, 0, 8]]

    Args:
        tokens: the ids of one prompt, prompts `[prompts, length]`, or a list of prompts of any lengths.
        mask: True for real tokens, where the prompts are one array already.

    Raises:
        SiteError: there are no prompts, or the shapes differ.
        TokenError: text in place of token ids.
    """
    if _is_text(tokens):
        raise TokenError(
            "the prompts are text where token ids were expected; encode them first, with "
            "load_tokenizer(folder).encode(text)."
        )
    if isinstance(tokens, Sequence) and len({np.shape(row) for row in tokens}) > 1:
        if mask is None and all(np.ndim(row) == 1 and np.size(row) for row in tokens):
            return pad_prompts(tokens)
        raise SiteError(
            "prompts of several lengths must be lists of at least one token id each, and have no mask; "
            "pass them without one, or padded into one array."
        )
    tokens = np.asarray(tokens)
    if tokens.ndim == 1:
        tokens = tokens[None]
        mask = None if mask is None else np.atleast_2d(np.asarray(mask))
    real = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask, bool)
    if tokens.ndim != 2 or not tokens.size or real.shape != tokens.shape:
        raise SiteError(
            f"tokens of shape {list(tokens.shape)} and a mask of shape {list(real.shape)} are not prompts; "
            "expected [prompts, length] for both, with at least one prompt."
        )
    return tokens, real


def _is_text(tokens: Any) -> bool:
    return isinstance(tokens, str | bytes) or (
        isinstance(tokens, Sequence) and any(isinstance(row, str | bytes) for row in tokens)
    )


def batches(total: int, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Row numbers `[size]` of one pass after the other, and how many of them are new.

    The last pass is filled up with its first row: all have one shape, and run one compiled program.
    """
    size = min(size, total)
    for start in range(0, total, size):
        rows = np.arange(start, min(start + size, total))
        yield np.concatenate([rows, np.full(size - len(rows), start)]), len(rows)


def filled_batches(size: int, *arrays: np.ndarray) -> Iterator[tuple[tuple[np.ndarray, ...], int]]:
    """Arrays with one number of rows in batches of exactly `size` rows, and how many of them are real.

    The last is filled up with zeros (False): all have one shape, and run one compiled program.

    >>> [(rows.tolist(), count) for (rows,), count in filled_batches(2, np.arange(3))]
    [([0, 1], 2), ([2, 0], 1)]
    """
    for start in range(0, len(arrays[0]), size):
        parts = [array[start : start + size] for array in arrays]
        missing = size - len(parts[0])
        yield (
            tuple(np.pad(part, [(0, missing)] + [(0, 0)] * (part.ndim - 1)) for part in parts),
            len(parts[0]),
        )


def map_pieces(function: Callable[[Any], Any], rows: Any, size: int) -> Any:
    """`jax.lax.map(function, rows)` with `size` rows side by side, jittable.

    The last piece is filled up with the first row. `jax.lax.map` alone would compile the function a second
    time for a shorter one.

    Args:
        function: map from one row of every array to arrays.
        rows: a pytree of arrays `[n, ...]`, n at least 1.
        size: rows computed at a time.
    """
    count = jax.tree.leaves(rows)[0].shape[0]
    size = min(size, count)
    missing = -count % size

    def filled(x: Any) -> Any:
        return jnp.concatenate([x, jnp.broadcast_to(x[:1], (missing, *x.shape[1:]))]) if missing else x

    found = jax.lax.map(function, jax.tree.map(filled, rows), batch_size=size)
    return jax.tree.map(lambda x: x[:count], found)
