"""Two models of one vocabulary and the tokens that a decision is between; how they read contexts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mergelab.activations.batches import batches, bucket_size, pad_prompts, widen
from mergelab.activations.losses import UNEMBEDDED
from mergelab.errors import TokenError
from mergelab.merging.any_model import load_model, load_tokenizer
from mergelab.models.model import Model, Params
from mergelab.models.residual_stream import logits_of, require_decoder
from mergelab.text.chat import chat_ids, turn_end_ids
from mergelab.text.tokenizer import Tokenizer

__all__ = [
    "DecisionPair",
    "LoadedModel",
    "last_log_probs",
    "next_log_probs",
    "open_pair",
    "stacked",
    "token_id",
]

LoadedModel = tuple[Model, Params]


@dataclass(frozen=True)
class DecisionPair:
    """What is compared.

    Attributes:
        first: a model and its parameters: the one that stops.
        second: another of the same vocabulary.
        names: what they are called.
        tokenizer: tokenizer of both.
        ends: ids of tokens that end a text.
        chosen: ids of the tokens whose logits are followed, by the text that is shown; the end is the first.
        chat: whether prompts are turns of a conversation.
    """

    first: LoadedModel
    second: LoadedModel
    names: tuple[str, str]
    tokenizer: Tokenizer
    ends: tuple[int, ...]
    chosen: Mapping[str, int]
    chat: bool

    @property
    def models(self) -> tuple[LoadedModel, LoadedModel]:
        """Both."""
        return self.first, self.second

    @property
    def ids(self) -> np.ndarray:
        """Ids of the chosen tokens, int32 `[tokens]`."""
        return np.array([*self.chosen.values()], np.int32)

    @property
    def swappable(self) -> bool:
        """Whether parameters of one have a place in the other: equal shapes and dtypes."""
        shapes = [
            jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), params) for _, params in self.models
        ]
        return self.first[0].config == self.second[0].config and shapes[0] == shapes[1]

    def encode(self, prompt: str) -> list[int]:
        """Ids of a prompt: a turn of a conversation, or a text."""
        if self.chat:
            return chat_ids(self.tokenizer, [{"role": "user", "content": prompt}])
        return self.tokenizer.encode(prompt)

    def id_of(self, token: str | int) -> int:
        """The id of a token that is given by its text or its id.

        Raises:
            TokenError: a text has no token, or an id is beyond the vocabulary.
        """
        return token_id(self.tokenizer, token, self.first[0].config.vocab_size)

    def shown(self, token: int) -> str:
        """The text of a token."""
        return self.tokenizer.shown_piece(int(token))


def open_pair(
    first: str | Path | LoadedModel,
    second: str | Path | LoadedModel,
    tokens: Sequence[str | int],
    *,
    tokenizer: Tokenizer | str | Path | None = None,
    chat: bool | None = None,
    dtype: Any = None,
) -> DecisionPair:
    """Loads two models and finds the tokens.

    Args:
        first: a model folder or anything that `mergelab.load_model` takes; or a model with its parameters.
        second: another of the same vocabulary.
        tokens: texts of one token each (" Wait"), or ids; of a longer text the first token counts.
        tokenizer: tokenizer of both; that of the first folder if None.
        chat: whether prompts are turns of a conversation; where the tokenizer has a template if None.
        dtype: dtype of loaded parameters; the stored one if None.

    Raises:
        TokenError: the vocabularies differ, a text has no token, an id is beyond the vocabulary, or no token
            ends a text.
        CheckpointError: a model or the tokenizer cannot be read.
        SiteError: a model predicts no next tokens.
    """
    names = tuple(
        Path(one).name if isinstance(one, str | Path) else default
        for one, default in ((first, "first"), (second, "second"))
    )
    if names[0] == names[1]:
        names = (f"{names[0]} (first)", f"{names[1]} (second)")
    if tokenizer is None:
        if not isinstance(first, str | Path):
            raise TokenError("the models are in memory, and have no tokenizer; give one (tokenizer=).")
        tokenizer = load_tokenizer(first)
    elif isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer)
    loaded = [one if isinstance(one, tuple) else load_model(one, dtype=dtype) for one in (first, second)]
    sizes = []
    for model, _ in loaded:
        require_decoder(model)
        sizes.append(model.config.vocab_size)
    if sizes[0] != sizes[1]:
        raise TokenError(
            f"{names[0]} has a vocabulary of {sizes[0]:,} tokens and {names[1]} one of {sizes[1]:,}; a "
            "decision between tokens is compared in models that share them."
        )
    ends = turn_end_ids(tokenizer)
    if not ends:
        raise TokenError(f"{tokenizer.folder} names no token that ends a text; add eos_token to its files.")
    chosen = {tokenizer.shown_piece(ends[0]): ends[0]}
    for token in tokens:
        number = token_id(tokenizer, token, sizes[0])
        if number not in chosen.values():
            chosen[tokenizer.shown_piece(number)] = number
    talks = bool(tokenizer.chat_templates) if chat is None else chat
    return DecisionPair(loaded[0], loaded[1], (names[0], names[1]), tokenizer, ends, chosen, talks)


def token_id(tokenizer: Tokenizer, token: str | int, vocabulary: int) -> int:
    """The id of a token that is given by its text, of a longer text the first, or by its id.

    Raises:
        TokenError: a text has no token, or an id is beyond the vocabulary.
    """
    ids = [token] if isinstance(token, int) else tokenizer.encode(token, add_special_tokens=False)[:1]
    if not ids or not 0 <= ids[0] < vocabulary:
        raise TokenError(f"{token!r} is not a token of {tokenizer.folder}; give texts or ids of tokens.")
    return ids[0]


def stacked(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Contexts in one array, padded on the left to a bucket, and the mask: few shapes are compiled."""
    tokens, mask = pad_prompts(rows)
    return widen(tokens, mask, bucket_size(tokens.shape[1]))


def next_log_probs(loaded: LoadedModel, rows: Sequence[Sequence[int]], *, batch: int = 8) -> np.ndarray:
    """Log-probabilities of what follows each context, float32 `[rows, vocab]`, in nats."""
    tokens, mask = stacked(rows)
    found = []
    for places, count in batches(len(tokens), batch):
        found.append(np.asarray(last_log_probs(*loaded, tokens[places], mask[places]))[:count])
    return np.concatenate(found)


@partial(jax.jit, static_argnames="model")
def last_log_probs(model: Model, params: Params, tokens: Array, mask: Array) -> Array:
    """Log-probabilities after the last column, float32 `[batch, vocab]`."""
    hidden = model.apply(params, tokens, mask=mask, capture=UNEMBEDDED, logits=False).captured[UNEMBEDDED]
    return jax.nn.log_softmax(logits_of(model, params, jnp.asarray(hidden)[:, -1]), axis=-1)
