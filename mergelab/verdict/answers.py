"""Answers to prompts: how long they are, whether they end, and whether thinking closes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mergelab.activations.batches import batches
from mergelab.decoding.completion import complete
from mergelab.decoding.samplers import greedy
from mergelab.errors import EvaluationError
from mergelab.models.model import Model, Params
from mergelab.text.chat import chat_ids, turn_end_ids
from mergelab.text.tokenizer import Tokenizer

__all__ = ["THINK_END", "AnswerScores", "prompt_ids", "score_answers"]

THINK_END = "</think>"
"""What ends the thinking of most models."""


@dataclass(frozen=True)
class AnswerScores:
    """What a model answered: float64 `[prompts]` each, and the texts.

    Attributes:
        new_tokens: tokens of each answer, the one that ends it included.
        ended: 1 where it ended by itself, 0 where the limit ended it.
        thinking_closed: 1 where the text that ends thinking came.
        texts: answers, special tokens written out.
        limit: most tokens of an answer.
    """

    new_tokens: np.ndarray
    ended: np.ndarray
    thinking_closed: np.ndarray
    texts: tuple[str, ...]
    limit: int


def prompt_ids(tokenizer: Tokenizer, prompts: Sequence[str], *, chat: bool | None = None) -> list[list[int]]:
    """Token ids of prompts.

    Args:
        tokenizer: the model's.
        prompts: questions, or texts to continue.
        chat: whether they are put as the model's chat template has them; as it has one if None.

    Raises:
        ChatTemplateError: the template refuses a question, or there is none.
        EvaluationError: a prompt has no tokens.
    """
    asked = "default" in tokenizer.chat_templates if chat is None else chat
    found = [
        chat_ids(tokenizer, [{"role": "user", "content": prompt}]) if asked else tokenizer.encode(prompt)
        for prompt in prompts
    ]
    if (empty := next((number for number, ids in enumerate(found, 1) if not ids), None)) is not None:
        raise EvaluationError(f"prompt {empty} has no tokens to continue; give it a text")
    return found


def score_answers(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int,
    batch: int = 8,
    chat: bool | None = None,
    think_end: str = THINK_END,
) -> AnswerScores:
    """A model's answers, the most probable token each time.

    Args:
        model: a decoder.
        params: its parameters, on any mesh.
        tokenizer: its tokenizer.
        prompts: questions, or texts to continue.
        max_new_tokens: most tokens of an answer.
        batch: prompts at a time.
        chat: same as in `prompt_ids`.
        think_end: text that ends thinking.

    Raises:
        ChatTemplateError: as of `prompt_ids`.
        DecodingError: prompt and answer are more tokens than the model has positions.
    """
    ids = prompt_ids(tokenizer, [prompts] if isinstance(prompts, str) else prompts, chat=chat)
    done = []
    for rows, new in batches(len(ids), batch):
        part = [ids[row] for row in rows]
        answers = complete(
            model,
            params,
            tokenizer,
            part,
            max_new_tokens=max_new_tokens,
            sampler=greedy(),
            end_ids=turn_end_ids(tokenizer),
        )
        done += answers[:new]
    texts = tuple(tokenizer.decode(one.token_ids, skip_special_tokens=False) for one in done)
    return AnswerScores(
        np.array([float(len(one.token_ids)) for one in done]),
        np.array([float(one.stop == "token") for one in done]),
        np.array([float(think_end in text) for text in texts]),
        texts,
        max_new_tokens,
    )
