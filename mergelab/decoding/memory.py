"""A conversation's keys and values from turn to turn, so that a turn reads only the tokens that are new."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mergelab.activations.batches import bucket_size, check_prompts, widen
from mergelab.decoding.generation_state import GenerationState, on_device, read_on, unread
from mergelab.decoding.steps import lengths_of_rotations
from mergelab.decoding.stop import Stop
from mergelab.models.cache import Cache
from mergelab.models.model import Model, Params

__all__ = ["Memory"]


class Memory:
    """What a model has read of one text; whatever text comes next is read from where the two part.

    The numbers are those of reading the whole text at once, windows and rotations among them: tokens lie in
    the slots of their positions, and padding on the right is forgotten once it has been passed. Where
    rotations depend on how long a text is (LongRoPE), one that outgrows a length is read from its beginning;
    so is, by a model with recurrent layers, one that parts from what was read before its end.
    """

    def __init__(self) -> None:
        self._tokens: tuple[int, ...] = ()
        self._cache: Cache | None = None

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens whose keys and values are held."""
        return self._tokens

    def begin(
        self, model: Model, params: Params, prompt: Sequence[int], *, max_new_tokens: int, stop: Stop
    ) -> GenerationState:
        """Reads one prompt but for its last token, as `mergelab.decoding.begin` does without edits.

        Args:
            model: the decoder, the same in every call.
            params: its parameters, the same in every call.
            prompt: token ids of the whole text so far.
            max_new_tokens: largest number of tokens that will be generated.
            stop: rule that ends the row.

        Raises:
            DecodingError: the prompt is empty, or an id is unknown.
        """
        row = np.asarray([prompt], np.int32)
        check_prompts(row, np.ones(row.shape, bool), model.config.vocab_size)
        known = self._known(model, prompt)
        new = row[:, known:-1]
        width = bucket_size(new.shape[1]) if new.size else 0
        capacity = bucket_size(max_new_tokens)
        padded, real = (
            on_device(part) for part in widen(row, np.ones(row.shape, bool), bucket_size(row.size))
        )
        slots = bucket_size(max(known + width, row.size - 1 + capacity))
        begun = unread(
            model, params, padded, real, np.int32(row.size), stop, capacity=capacity,
            cache=self._rewound(known, slots),
            slots=slots,
        )  # fmt: skip
        self._cache = None  # its memory becomes that of the next
        begun = replace(begun, prompt=on_device(row))
        if not new.size:
            return begun
        # Padding on the right leaves no hole in the slots, which windows count.
        tokens, mask = np.zeros((1, width), np.int32), np.zeros((1, width), np.bool_)
        tokens[:, : new.size], mask[:, : new.size] = new, True
        cache = read_on(model, params, on_device(tokens), on_device(mask), begun.cache)
        return replace(begun, cache=_rewind(cache, row.size - 1))

    def keep(self, prompt: Sequence[int], progress: GenerationState) -> None:
        """Remembers a prompt and what was generated after it.

        Args:
            prompt: what `begin` was given.
            progress: what has become of its result.
        """
        steps = int(progress.steps)
        text = (*prompt, *np.asarray(progress.tokens)[0, :steps].tolist())
        self._tokens, self._cache = text[: len(prompt) - 1 + steps], progress.cache

    def _known(self, model: Model, prompt: Sequence[int]) -> int:
        """How many tokens of a prompt need not be read; its last one is never among them."""
        pairs = zip(self._tokens, prompt[:-1], strict=False)
        known = next(
            (n for n, (old, new) in enumerate(pairs) if old != new), min(len(self._tokens), len(prompt) - 1)
        )
        longest = max(len(self._tokens) + 1, len(prompt))
        crossed = any(known <= length < longest for length in lengths_of_rotations(model))
        if self._cache is not None and self._cache.recurrent:
            crossed |= known < len(self._tokens)  # a state holds all of its tokens or none
        return 0 if self._cache is None or crossed else known

    def _rewound(self, known: int, slots: int) -> Cache | None:
        """The cache with its first tokens, and at least so many slots; None if there is none."""
        cache = self._cache
        if cache is None or not known:
            return None
        if cache.slots < slots:
            keys, values = (
                tuple(x if n in cache.recurrent else _widened(x, slots) for n, x in enumerate(part))
                for part in (cache.keys, cache.values)
            )
            mask = np.zeros((1, slots), np.bool_)
            cache = replace(cache, keys=keys, values=values, mask=on_device(mask))
        return _rewind(cache, known)


def _rewind(cache: Cache, length: int) -> Cache:
    """`Cache.rewind` of one row whose slots are all real; it compiles nothing."""
    mask = np.arange(cache.slots)[None] < length
    return replace(cache, mask=on_device(mask), length=on_device(np.array([length], np.int32)))


@partial(jax.jit, static_argnames="slots")
def _widened(kept: Array, slots: int) -> Array:
    return jnp.pad(kept, ((0, 0), (0, slots - kept.shape[1]), (0, 0), (0, 0)))
