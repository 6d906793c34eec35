"""Text in, text out: the plain call around `complete`, for one prompt or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import overload

import numpy as np
from jaxtyping import Array, Key

from mergelab.decoding.completion import complete
from mergelab.decoding.samplers import Sampler
from mergelab.errors import DecodingError
from mergelab.models.model import Model, Params
from mergelab.models.sites import Edit
from mergelab.text.tokenizer import Tokenizer

__all__ = ["generate_text"]

Prompt = str | Sequence[int] | np.ndarray
"""A text, or the token ids of one."""


@overload
def generate_text(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    prompts: str,
    *,
    max_new_tokens: int = ...,
    sampler: Sampler | None = ...,
    seed: Key[Array, "*batch"] | int = ...,
    stop: str | Sequence[str] = ...,
    edit: Mapping[str, Edit] | None = ...,
) -> str: ...


@overload
def generate_text(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[int] | Sequence[Prompt] | np.ndarray,
    *,
    max_new_tokens: int = ...,
    sampler: Sampler | None = ...,
    seed: Key[Array, "*batch"] | int = ...,
    stop: str | Sequence[str] = ...,
    edit: Mapping[str, Edit] | None = ...,
) -> str | list[str]: ...


def generate_text(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    sampler: Sampler | None = None,
    seed: Key[Array, "*batch"] | int = 0,
    stop: str | Sequence[str] = (),
    edit: Mapping[str, Edit] | None = None,
) -> str | list[str]:
    """Continues one prompt, or several at once.

    `mergelab.decoding.complete` also tells tokens and why each text ended; `mergelab.decoding.generate` is
    the compiled loop over token ids, without a tokenizer.

    Args:
        model: a decoder.
        params: its parameters, on one device or sharded.
        tokenizer: its tokenizer, such as `load_tokenizer` gives.
        prompts: a text or the token ids of one; or a sequence of such prompts.
        max_new_tokens: greatest number of tokens added to a prompt.
        sampler: choice of each token; the most probable one by default.
        seed: seed or key of the draws, folded with the prompt's index.
        stop: strings that end a text, and are not part of it.
        edit: functions by site name or glob pattern, as in `Model.apply`.

    Returns:
        The new text of the one prompt, without the prompt; or a list with that of each.

    Raises:
        DecodingError: the tokenizer and the prompts are in each other's place, a prompt is empty, or there
            are more tokens than the model has positions.
        SiteError: an edit names no site, or changes shape or dtype.
    """
    if not hasattr(tokenizer, "encode") or not hasattr(tokenizer, "decode"):
        raise DecodingError(
            f"the third argument is of type {type(tokenizer).__name__}; expected the tokenizer there, and "
            "the prompts after it: generate(model, params, tokenizer, prompts)."
        )
    single = _is_one(prompts)
    asked = [prompts] if single else list(prompts)
    ids = [prompt if isinstance(prompt, str) else np.asarray(prompt).tolist() for prompt in asked]
    strings = [stop] if isinstance(stop, str) else stop
    found = complete(
        model,
        params,
        tokenizer,
        ids,
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        key=seed,
        stop_strings=strings,
        edit=edit,
    )
    return found[0].text if single else [completion.text for completion in found]


def _is_one(prompts: Prompt | Sequence[Prompt]) -> bool:
    """Whether this is one text or the ids of one, and not a sequence of them."""
    if isinstance(prompts, str):
        return True
    return len(prompts) > 0 and not isinstance(prompts[0], str) and np.ndim(prompts[0]) == 0
