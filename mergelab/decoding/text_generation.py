"""Text in, text out: the plain call around `complete`, for one prompt or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, overload

import numpy as np
from jaxtyping import Array, Key

from mergelab.decoding.completion import complete
from mergelab.decoding.samplers import Sampler
from mergelab.errors import DecodingError
from mergelab.models.model import Model, Params
from mergelab.models.sites import Edit
from mergelab.text.chat import Message, chat_ids, turn_end_ids
from mergelab.text.tokenizer import Tokenizer

__all__ = ["conversation", "generate_text", "is_conversation"]

Prompt = str | Sequence[int] | np.ndarray | Sequence[Message]
"""A text, the token ids of one, or the messages of a conversation."""


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
    chat: bool = ...,
    system: str | None = ...,
) -> str: ...


@overload
def generate_text(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[int] | Sequence[Message] | Sequence[Prompt] | np.ndarray,
    *,
    max_new_tokens: int = ...,
    sampler: Sampler | None = ...,
    seed: Key[Array, "*batch"] | int = ...,
    stop: str | Sequence[str] = ...,
    edit: Mapping[str, Edit] | None = ...,
    chat: bool = ...,
    system: str | None = ...,
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
    chat: bool = False,
    system: str | None = None,
) -> str | list[str]:
    """Continues one prompt, or answers one conversation, or several at once.

    `mergelab.decoding.complete` also tells tokens and why each text ended; `mergelab.decoding.generate` is
    the compiled loop over token ids, without a tokenizer.

    Args:
        model: a decoder.
        params: its parameters, on one device or sharded.
        tokenizer: its tokenizer, such as `load_tokenizer` gives.
        prompts: a text, the token ids of one, or the messages of a conversation, such as
            `[{"role": "user", "content": "Hello"}]`; or a sequence of such prompts.
        max_new_tokens: greatest number of tokens added to a prompt.
        sampler: choice of each token; the most probable one by default.
        seed: seed or key of the draws, folded with the prompt's index.
        stop: strings that end a text, and are not part of it.
        edit: functions by site name or glob pattern, as in `Model.apply`.
        chat: whether texts are questions, put as the model's chat template has them; messages always are.
        system: instruction that stands before each conversation.

    Returns:
        The new text of the one prompt, without the prompt; or a list with that of each.

    Raises:
        ChatTemplateError: the model has no chat template, or it refuses the messages.
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
    asked: list[Any] = [prompts] if single else list(prompts)
    chats = [is_conversation(prompt) or (chat and isinstance(prompt, str)) for prompt in asked]
    if system is not None and not all(chats):
        raise DecodingError(
            "a system message was given for prompts that are not conversations; set chat=True, or give "
            "messages."
        )
    ids = [
        chat_ids(tokenizer, conversation(prompt, system))
        if is_chat
        else tokenizer.encode(prompt)
        if isinstance(prompt, str)
        else np.asarray(prompt).tolist()
        for prompt, is_chat in zip(asked, chats, strict=True)
    ]
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
        end_ids=turn_end_ids(tokenizer) if any(chats) else None,
        edit=edit,
    )
    return found[0].text if single else [completion.text for completion in found]


def is_conversation(prompt: Any) -> bool:
    """Whether this is a sequence of messages."""
    return isinstance(prompt, Sequence) and len(prompt) > 0 and all(isinstance(m, Mapping) for m in prompt)


def conversation(prompt: str | Sequence[Message], system: str | None = None) -> list[Message]:
    """The messages of a question or a conversation, after an instruction where there is one."""
    first: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": prompt}] if isinstance(prompt, str) else [*first, *prompt]


def _is_one(prompts: Prompt | Sequence[Prompt]) -> bool:
    """Whether this is one prompt, and not a sequence of them."""
    if isinstance(prompts, str) or is_conversation(prompts):
        return True
    first: Any = prompts[0] if len(prompts) else None
    return len(prompts) > 0 and not isinstance(first, str) and np.ndim(first) == 0
