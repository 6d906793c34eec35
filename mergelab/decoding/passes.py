"""A model as a function of new tokens and a cache, for loops that read it in their own way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.tree_util import Partial
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from mergelab.decoding.steps import lengths_of_rotations
from mergelab.decoding.transforms import require
from mergelab.models.blockwise import Blockwise, runs_by_block
from mergelab.models.cache import Cache
from mergelab.models.model import Model, Output, Params
from mergelab.models.sites import Edit, as_partials

__all__ = ["Reader", "check_one_rotation", "check_takes_back", "uneven"]


class Reader:
    """A decoder and its parameters, ready to read tokens behind those in a cache.

    On one CPU device it runs by block (`mergelab.models.blockwise`), elsewhere as one compiled pass; the
    memory of the cache given becomes that of the cache returned.

    Args:
        model: a decoder.
        params: its parameters.
        capture: names of sites to return.
        edit: functions by site name or glob pattern, as in `Model.apply`.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        *,
        capture: Sequence[str] = (),
        edit: Mapping[str, Edit] | None = None,
    ) -> None:
        self._model, self._params = model, params
        self._capture, self._edit = tuple(capture), as_partials(edit)
        self._blocks: Blockwise | None = None

    def __call__(self, tokens: Int[Array, "batch new"], cache: Cache, places: Any = None) -> Output:
        """Logits after each of the tokens, and the cache with them."""
        if not runs_by_block(self._model, self._params, cache):
            return _whole(self._model, self._params, tokens, cache, self._edit, places, capture=self._capture)
        if self._blocks is None:
            self._blocks = Blockwise(self._model, self._params, capture=self._capture, edit=self._edit)
        return self._blocks(tokens, cache, places=places)


@partial(jax.jit, static_argnames=("model", "capture"), donate_argnames="cache")
def _whole(
    model: Model,
    params: Params,
    tokens: Int[Array, "batch new"],
    cache: Cache,
    edit: Mapping[str, Partial],
    places: Any,
    *,
    capture: tuple[str, ...],
) -> Output:
    return model.apply(params, tokens, cache=cache, edit=edit, places=places, capture=capture)


def uneven(cache: Cache) -> Cache:
    """The cache as one whose rows may be of different lengths; one row alone stays as it is."""
    return cache if cache.mask.shape[0] == 1 else replace(cache, even=False)


def check_takes_back(model: Model, what: str) -> None:
    """Refuses a model that cannot forget the latest tokens of a text, for a way of decoding that must.

    Raises:
        DecodingError: it has recurrent layers.
    """
    layers = model.config.recurrent if model.causal else ()
    kind = f"a {model.family.model_type!r} model with {len(layers)} recurrent layers"
    require(what, kind, not layers, "a model of attention alone: it takes tokens back, which a state cannot")


def check_one_rotation(model: Model, tokens: np.ndarray, mask: ArrayLike | None, max_new_tokens: int) -> None:
    """Refuses texts that grow beyond a length at which a model rotates all of their tokens otherwise.

    Raises:
        DecodingError: a text would (LongRoPE); `generate` reads it anew there, other loops do not.
    """
    if not (bounds := lengths_of_rotations(model)) or np.ndim(tokens) != 2:
        return
    real = np.full(len(tokens), tokens.shape[1]) if mask is None else np.asarray(mask, bool).sum(axis=1)
    for bound in sorted(bounds):
        crossed = bool(((real <= bound) & (real + max_new_tokens > bound)).any())
        place = f"{int(real.max())} tokens and {max_new_tokens} new ones"
        require("this way of decoding", place, not crossed, f"texts on one side of the model's {bound}")
