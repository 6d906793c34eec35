"""Token ids and lengths that a model has embeddings for: beyond them lookups give NaN, or another row."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.core import Tracer

from mergelab.errors import TokenError, quoted

__all__ = [
    "Embeds",
    "check_ids",
    "check_images",
    "check_length",
    "check_positions",
    "check_token_array",
    "check_tokens",
    "concrete",
    "learned_positions",
    "window_length",
]


@runtime_checkable
class Embeds(Protocol):
    """What embeds tokens and positions: a model, as far as these checks look at it."""

    @property
    def config(self) -> Any:
        """Its sizes: `vocab_size`, `max_length`, and whether it has `learned_positions`."""
        ...


def learned_positions(model: Embeds) -> int | None:
    """How many positions have a learned embedding; None where positions are rotations, which do not end."""
    return model.config.max_length if model.config.learned_positions else None


def concrete(values: Any) -> np.ndarray | None:
    """Values as a host array; None while JAX traces them, or where they lie on other processes' devices."""
    if isinstance(values, Tracer) or (isinstance(values, jax.Array) and not values.is_fully_addressable):
        return None
    return np.asarray(values)


def check_tokens(model: Embeds, tokens: Any, mask: Any = None, *, place: str = "tokens") -> None:
    """Checks concrete token ids, padding among them, and the length of the longest row.

    Args:
        model: what will read them.
        tokens: ids `[..., length]`, or one list of them.
        mask: True for real tokens; all by default.
        place: what they are, for messages.

    Raises:
        TokenError: ids outside the model's vocabulary, or more tokens than it has learned positions.
    """
    check_ids(tokens, model.config.vocab_size, "the model's vocabulary", place)
    shape = np.shape(tokens)
    if len(shape) > 0:
        real = None if mask is None else concrete(mask)
        length = shape[-1] if real is None else int(real.sum(axis=-1).max(initial=0))
        check_length(model, length, place=place)


def check_token_array(tokens: Any) -> None:
    """Checks that tokens are an array `[batch, length]`; a text or a list is what people try first.

    Raises:
        TokenError: they are not.
    """
    texts = [tokens] if isinstance(tokens, str) else tokens if isinstance(tokens, list | tuple) else []
    if any(isinstance(text, str) for text in texts):
        raise TokenError(
            f"tokens: found the text {quoted(tokens)}, but a model reads token ids [batch, length]; encode "
            "it first: jnp.array([mergelab.load_tokenizer(path).encode(text)])."
        )
    shape = getattr(tokens, "shape", None)
    if shape is None or len(shape) != 2:
        found = f"a {type(tokens).__name__}" if shape is None else f"an array of shape {list(shape)}"
        raise TokenError(
            f"tokens: found {found}, but a model reads an array of token ids [batch, length]; write "
            "jnp.array([ids]) for one text."
        )


def check_images(images: Any, shape: tuple[int, int, int], kind: str) -> None:
    """Checks that pixel values are an array `[batch, channels, height, width]` of a model's own sizes.

    Args:
        images: what is given in place of tokens.
        shape: channels, height and width that the model reads.
        kind: its model type, for messages.

    Raises:
        TokenError: they are not.
    """
    found, dtype = getattr(images, "shape", None), getattr(images, "dtype", None)
    floats = dtype is not None and jax.numpy.issubdtype(dtype, jax.numpy.floating)
    if found is None or len(found) != 4 or tuple(found[1:]) != shape or not floats:
        what = f"a {type(images).__name__}" if found is None else f"{dtype} of shape {list(found)}"
        raise TokenError(
            f"images: found {what}, but a {kind!r} model reads pixel values "
            f"[batch, {', '.join(map(str, shape))}] (channels, height, width), floats normalized as "
            "its preprocessor_config.json says."
        )


def check_ids(ids: Any, size: int, what: str, place: str) -> None:
    """Checks that concrete ids are rows of a table.

    Raises:
        TokenError: they are not integers from 0 to `size - 1`.
    """
    found = concrete(ids)
    if found is None or not found.size:
        return
    if found.dtype.kind not in "iu":
        raise TokenError(f"{place}: token ids are {found.dtype} where integers were expected.")
    low, high = int(found.min()), int(found.max())
    if size == 0:
        raise TokenError(f"{place}: token ids are given, but the model reads images and has no vocabulary.")
    if low < 0:
        raise TokenError(f"{place}: token {low} is negative; ids of {what} run from 0 to {size - 1}.")
    if high >= size:
        raise TokenError(
            f"{place}: token {high} is beyond {what} of {size} (ids from 0 to {size - 1}); use the tokenizer "
            "files that belong to this "
            "model."
        )


def check_length(model: Embeds, length: int, *, place: str = "tokens") -> None:
    """Checks a length against the learned positions; it is known even while JAX traces the tokens.

    Raises:
        TokenError: there are fewer positions.
    """
    room = learned_positions(model)
    if room is not None and length > room:
        raise TokenError(
            f"{place}: {length} tokens are more than the model's {room} learned positions; cut them into "
            f"pieces of at most {room} tokens."
        )


def window_length(model: Embeds, asked: int | None, default: int, *, place: str = "context") -> int:
    """How many tokens a piece of text has: what is asked for, or the default as far as positions go.

    Args:
        model: what will read them; rotary positions count as far as the model is made for.
        asked: None for the default.
        default: never refused, only cut.
        place: what asks, for messages.

    Raises:
        TokenError: more is asked for than there are positions.
    """
    room = model.config.max_length
    if asked is not None and asked > room:
        raise TokenError(
            f"{place}: {asked} tokens are more than the model's {room} positions; ask for at most {room}."
        )
    return min(default, room) if asked is None else asked


def check_positions(model: Embeds, positions: Any, *, place: str = "positions") -> None:
    """Checks concrete positions against the learned ones.

    Raises:
        TokenError: a position is negative or has no embedding.
    """
    room = learned_positions(model)
    found = None if room is None else concrete(positions)
    if room is None or found is None or not found.size:
        return
    low, high = int(found.min()), int(found.max())
    if low < 0 or high >= room:
        bad = low if low < 0 else high
        raise TokenError(
            f"{place}: position {bad} is none of the model's {room} learned positions (0 to {room - 1}); "
            "give fewer tokens."
        )
