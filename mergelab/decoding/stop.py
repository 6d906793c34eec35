"""When a row ends: token ids and token sequences inside the compiled loop, strings afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int

from mergelab.decoding.monitors import Monitor
from mergelab.decoding.transforms import require, transform

__all__ = ["Stop", "cut_at_strings", "stop_at"]

_ANY = -1  # left of a sequence shorter than the longest
NO_TOKEN = -2  # what a row's recent tokens hold before it has any


@transform
class Stop:
    """Ends a row when it generates one of some tokens, or one of some sequences; build it with `stop_at`.

    Attributes:
        ids: int32 `[ends]`.
        sequences: int32 `[sequences, width]`, aligned right.
        monitor: what is read off the model in every step, which may end rows too; None for nothing.
    """

    ids: ArrayLike
    sequences: ArrayLike
    monitor: Monitor | None = None

    @property
    def width(self) -> int:
        """How many of the latest tokens decide."""
        return np.shape(self.sequences)[1]

    def no_recent(self, batch: int) -> Int[Array, "batch width"]:
        """The recent tokens of rows that have generated none: nothing of a prompt can end a row."""
        return jnp.full((batch, self.width), NO_TOKEN, jnp.int32)

    def push(
        self, recent: Int[Array, "batch width"], token: Int[Array, " batch"]
    ) -> Int[Array, "batch width"]:
        """The recent tokens after one more."""
        return jnp.concatenate([recent, token[:, None]], axis=1)[:, 1:]

    def __call__(
        self, recent: Int[Array, "batch width"], token: Int[Array, " batch"]
    ) -> Bool[Array, " batch"]:
        """True for the rows that end with `token`, the last of `recent` where that is not empty."""
        ended = (token[:, None] == jnp.asarray(self.ids)[None, :]).any(axis=1)
        wanted = jnp.asarray(self.sequences)[None]
        matched = ((wanted == recent[:, None, :]) | (wanted == _ANY)).all(axis=2).any(axis=1)
        return ended | matched


def stop_at(
    ids: Iterable[int] = (), sequences: Iterable[Sequence[int]] = (), *, monitor: Monitor | None = None
) -> Stop:
    """The rule that ends a row after any of the tokens `ids` or any of the token `sequences`.

    With a `monitor` (`mergelab.decoding.monitor`) it also ends with the token in whose pass that asks for it;
    the readings of every step are kept.

    Raises:
        DecodingError: a sequence is empty, or an id is negative.
    """
    ids, sequences = tuple(ids), tuple(map(tuple, sequences))
    for sequence in sequences:
        require("stop_at", list(sequence), len(sequence) > 0, "stop sequences of at least one token")
    for token in (*ids, *(token for sequence in sequences for token in sequence)):
        require("stop_at", token, token >= 0, "token ids of at least 0")
    width = max(map(len, sequences), default=0)
    aligned = [[_ANY] * (width - len(sequence)) + list(sequence) for sequence in sequences]
    stacked = np.array(aligned, np.int32).reshape(len(sequences), width)
    return Stop(np.array(ids, np.int32), stacked, monitor)


def cut_at_strings(text: str, strings: Iterable[str]) -> tuple[str, str | None]:
    """`text` up to the first of `strings` in it, and which one that was (None: `text` is whole).

    Of strings that begin at the same place, the longest counts.

    >>> cut_at_strings("Paris.\\nQ: next", ["\\n", "\\nQ:"])
    ('Paris.', '\\nQ:')

    Raises:
        DecodingError: a string is empty.
    """
    found: list[tuple[int, int, str]] = []
    for string in strings:
        require("cut_at_strings", string, bool(string), "stop strings that are not empty")
        if (place := text.find(string)) >= 0:
            found.append((place, -len(string), string))
    if not found:
        return text, None
    place, _, string = min(found)
    return text[:place], string
