"""Sets of prompts: read from files, put into a model's chat format, and cut into left-padded batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mergelab.activations.batches import batches, pad_prompts
from mergelab.errors import MergelabError
from mergelab.text.chat import Message, chat_text
from mergelab.text.prompt_file import read_prompts
from mergelab.text.tokenizer import Tokenizer

__all__ = ["PromptBatch", "Prompts", "encode_prompts", "post_instruction_tokens", "read_prompts"]

_PROBES = ("Name three rivers.", "How does a kettle know when to stop?")
"""Two instructions with nothing in common at their ends."""


@dataclass(frozen=True)
class PromptBatch:
    """Prompts of one forward pass.

    Attributes:
        tokens: int32 `[batch, length]`.
        mask: bool `[batch, length]`, True for real tokens.
        real: how many rows are prompts; the rest repeat one of them, to keep the shape.
    """

    tokens: np.ndarray
    mask: np.ndarray
    real: int


@dataclass(frozen=True)
class Prompts:
    """Prompts as one array, padded on the left: their last tokens stand in the last column.

    Attributes:
        tokens: int32 `[n, length]`.
        mask: bool `[n, length]`, True for real tokens.
    """

    tokens: np.ndarray
    mask: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], pad_id: int = 0) -> Prompts:
        """Stacks token ids.

        Raises:
            DecodingError: there are none, or an empty one.
        """
        return cls(*pad_prompts(rows, pad_id))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def shortest(self) -> int:
        """Tokens of the shortest prompt."""
        return int(self.mask.sum(axis=1).min())

    def rows(self) -> list[list[int]]:
        """The token ids of each prompt, without padding."""
        return [row[real].tolist() for row, real in zip(self.tokens, self.mask, strict=True)]

    def split(self, share: float) -> tuple[Prompts, Prompts]:
        """The first `share` of the prompts, and the rest; both hold at least one.

        Raises:
            MergelabError: there are fewer than two prompts.
        """
        if len(self) < 2:
            raise MergelabError(
                f"{len(self)} prompt cannot be split into one set to find directions and one to choose among "
                "them; give more prompts."
            )
        cut = min(max(round(share * len(self)), 1), len(self) - 1)
        return Prompts(self.tokens[:cut], self.mask[:cut]), Prompts(self.tokens[cut:], self.mask[cut:])

    def shuffled(self, seed: int) -> Prompts:
        """The same prompts in an order that the seed decides."""
        order = np.random.default_rng(seed).permutation(len(self))
        return Prompts(self.tokens[order], self.mask[order])

    def batches(self, size: int) -> Iterator[PromptBatch]:
        """All prompts in order, in batches of exactly `min(size, n)` rows."""
        for rows, real in batches(len(self), size):
            yield PromptBatch(self.tokens[rows], self.mask[rows], real)


def encode_prompts(
    tokenizer: Tokenizer,
    texts: str | Sequence[str],
    *,
    system: str | None = None,
    response_prefix: str = "",
) -> Prompts:
    """Prompts as the user's turns of the model's chat template; as plain text where it has none.

    Args:
        tokenizer: the model's.
        texts: the instructions, or one.
        system: a system turn before each, for templates.
        response_prefix: text that every answer of the model begins with, such as `<think>`, so that the next
            token is the first that differs.

    Raises:
        ChatTemplateError: the template refuses the turns.
        MergelabError: a system turn is given to a model without a template.
    """
    texts = [texts] if isinstance(texts, str) else texts
    if "default" not in tokenizer.chat_templates:
        if system is not None:
            raise MergelabError(
                f"{tokenizer.folder} has no chat template, so that a system prompt has no place; leave it "
                "away."
            )
        return Prompts.of([tokenizer.encode(text + response_prefix) for text in texts], tokenizer.pad_id)
    first: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    chats = [chat_text(tokenizer, [*first, {"role": "user", "content": text}]) for text in texts]
    rows = [tokenizer.encode(chat + response_prefix, add_special_tokens=False) for chat in chats]
    return Prompts.of(rows, tokenizer.pad_id)


def post_instruction_tokens(tokenizer: Tokenizer, *sets: Prompts, response_prefix: str = "") -> int:
    """How many tokens every prompt ends with alike: what the template puts after the instruction, at least 1.

    At those tokens a model has read the whole instruction, and nothing else differs.

    Args:
        tokenizer: the model's.
        *sets: prompts that must agree in those tokens, besides two that have nothing else in common.
        response_prefix: text that those prompts end with, as in `encode_prompts`.
    """
    sets = (encode_prompts(tokenizer, _PROBES, response_prefix=response_prefix), *sets)
    shortest = min(prompts.shortest for prompts in sets)
    endings = np.concatenate([prompts.tokens[:, -shortest:] for prompts in sets])[:, ::-1]
    alike = (endings == endings[:1]).all(axis=0)
    # Not the first token of any prompt: it is alike too, and an attention sink.
    return max(min(int(np.argmin([*alike, False])), shortest - 1), 1)
