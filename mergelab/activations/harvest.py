"""Sites of a streamed model on a text, taken for many contexts at once and kept for readers of rows."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import Array

from mergelab.activations.batches import filled_batches
from mergelab.activations.passes import TokenBatch, Trees, kept_of_all
from mergelab.models.model import Model
from mergelab.models.streamed import StreamedParams

__all__ = ["Harvest", "side_by_side"]


class Harvest:
    """Rows of sites, token by token, of a model whose weights are read once for all of them.

    What the rows of all contexts take on disk is unlimited; held in memory they are taken in as few parts as
    `params.memory` has room for, each of which reads the weights once: that suits a reader that goes from the
    first row to the last.

    Args:
        model: the model.
        params: its streamed parameters.
        tokens: int32 `[contexts, length]`.
        sites: names of sites `[batch, length, ...]`.
        batch: contexts in one program.
    """

    def __init__(
        self, model: Model, params: StreamedParams, tokens: Any, sites: Sequence[str], batch: int
    ) -> None:
        self._model, self._params, self._tokens = model, params, tokens
        self._sites, self._batch = tuple(sites), batch
        width = sum(math.prod(map(int, model.sites()[site][2:])) for site in sites)
        each = tokens.shape[1] * (4 * model.config.d_model + 4 * width)  # the stream's wait, and the rows'
        parts = len(tokens)
        if params.spill is None:
            parts = max(1, params.memory // (each * batch)) * batch
        self._at_once = min(parts, len(tokens))
        self._part: tuple[int, Trees] | None = None
        self._lock = threading.Lock()

    def rows(self, start: int, stop: int) -> list[np.ndarray]:
        """Rows `start` to `stop` of every site, `[stop - start, width]`, in the dtype of the site."""
        length = self._tokens.shape[1]
        per_part, per_call = self._at_once * length, self._batch * length
        found: list[list[np.ndarray]] = [[] for _ in self._sites]
        while start < stop:
            number, within = divmod(start, per_part)
            call, first = divmod(within, per_call)
            last = min(first + stop - start, per_call, per_part - call * per_call)
            with self._lock:
                kept = self._taken(number)
                contexts = first // length, -(-last // length)
                for site, parts in zip(self._sites, found, strict=True):
                    piece = kept.rows((call, site), *contexts)
                    piece = piece.reshape(-1, piece.shape[-1])
                    parts.append(piece[first - contexts[0] * length : last - contexts[0] * length])
            start += last - first
        return [np.concatenate(parts) for parts in found]

    def _taken(self, number: int) -> Trees:
        """The rows of a part of the contexts."""
        if self._part is None or self._part[0] != number:
            if self._part is not None:
                self._part[1].close()
                self._part = None
            some = self._tokens[number * self._at_once : (number + 1) * self._at_once]
            calls = [
                TokenBatch(np.asarray(tokens, np.int32)) for (tokens,), _ in filled_batches(self._batch, some)
            ]
            kept = kept_of_all(self._model, self._params, calls, self._sites, _side_by_side)
            self._part = number, kept
        return self._part[1]


def side_by_side(x: Array) -> Array:
    """What a site holds as one vector of each token: heads, `[batch, length, heads, d]`, side by side."""
    return x.reshape(*x.shape[:2], -1) if x.ndim > 3 else x


def _side_by_side(x: Array, extra: Any) -> Array:
    return side_by_side(x)
