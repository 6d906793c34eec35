"""Prompts on which one model ends its answer and the other goes on, found by letting both answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergelab.activations.batches import pad_prompts
from mergelab.decoding.generation import generate
from mergelab.decoding.stop import stop_at
from mergelab.errors import DecodingError
from mergelab.reasoning.decision_pair import DecisionPair, LoadedModel

__all__ = ["CANDIDATES", "StoppedPrompt", "answers_of", "find_stopping_prompts"]

CANDIDATES = (
    "What is the capital of France?",
    "What is 17 + 25?",
    "What is 3 * 4?",
    "Name a color.",
    "Is the sky blue? Answer yes or no.",
    "What do bees make?",
    "How many legs does a spider have?",
    "What is the opposite of hot?",
    "Who wrote Hamlet?",
    "Which is larger, 9 or 7?",
    "What is the first letter of the alphabet?",
    "Say hello.",
)
"""Prompts with short answers, tried where none are given."""


@dataclass(frozen=True)
class StoppedPrompt:
    """A prompt, and the first model's answer to it.

    Attributes:
        prompt: its text.
        context: ids of the prompt and of the first model's answer, without the token that ended it.
        answer: text of that answer.
        other: text of the second model's.
        lengths: tokens of both answers, those that ended them among them.
        ended: whether each answer came to its end within the tokens allowed.
    """

    prompt: str
    context: tuple[int, ...]
    answer: str
    other: str
    lengths: tuple[int, int]
    ended: tuple[bool, bool]

    @property
    def parted(self) -> bool:
        """Whether the first model stops where the second goes on."""
        return self.ended[0] and (not self.ended[1] or self.lengths[1] > self.lengths[0])


def find_stopping_prompts(
    pair: DecisionPair,
    prompts: Sequence[str] | None = None,
    *,
    most: int = 4,
    max_new_tokens: int = 64,
    batch: int = 8,
) -> tuple[list[StoppedPrompt], list[StoppedPrompt]]:
    """Lets both models answer, greedily, and keeps the prompts that part them.

    Args:
        pair: the two models.
        prompts: texts to try; `CANDIDATES` if None.
        most: number of prompts that are kept.
        max_new_tokens: largest number of tokens of an answer.
        batch: prompts that are answered at once.

    Returns:
        The prompts that are kept, those with the longest second answers for their first ones; where the first
        model ends on none before the second, those that it ends at all, or else all. And every prompt tried.

    Raises:
        DecodingError: there are no prompts, or the model has no place for the answers.
    """
    texts = [*(CANDIDATES if prompts is None else prompts)]
    if not texts or most < 1:
        raise DecodingError("there are no prompts to look for a decision in; give some texts.")
    asked = [pair.encode(text) for text in texts]
    answers = [answers_of(one, pair, asked, max_new_tokens, batch) for one in pair.models]
    tried = []
    for row, text in enumerate(texts):
        rows = [answer[row] for answer in answers]
        ended = tuple(bool(ids and ids[-1] in pair.ends) for ids in rows)
        bare = [ids[:-1] if end else ids for ids, end in zip(rows, ended, strict=True)]
        said = [pair.tokenizer.decode(ids) for ids in bare]
        lengths = (len(rows[0]), len(rows[1]))
        context = (*asked[row], *bare[0])
        tried.append(StoppedPrompt(text, context, said[0], said[1], lengths, (ended[0], ended[1])))
    parted = sorted((p for p in tried if p.parted), key=lambda p: p.lengths[0] - p.lengths[1])
    kept = parted or [p for p in tried if p.ended[0]] or tried
    return kept[:most], tried


def answers_of(
    loaded: LoadedModel, pair: DecisionPair, rows: Sequence[Sequence[int]], max_new_tokens: int, batch: int
) -> list[list[int]]:
    """The tokens that a model adds to each context, greedily, its end among them."""
    model, params = loaded
    found: list[list[int]] = []
    for start in range(0, len(rows), batch):
        part = [list(row) for row in rows[start : start + batch]]
        # One batch size for all: what fills up is answered, and not read.
        tokens, mask = pad_prompts([*part, *[part[0]] * (min(batch, len(rows)) - len(part))])
        stop: Any = stop_at(pair.ends)
        made = generate(model, params, tokens, mask, max_new_tokens=max_new_tokens, stop=stop)
        ids, lengths = np.asarray(made.tokens), np.asarray(made.lengths)
        found += [ids[n, : lengths[n]].tolist() for n in range(len(part))]
    return found
