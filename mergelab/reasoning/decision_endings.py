"""What two models make of an answer that ends otherwise: with `</think>`, a newline, a period."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mergelab.reasoning.decision_pair import DecisionPair, next_log_probs
from mergelab.reasoning.decision_prompts import StoppedPrompt, answers_of

__all__ = ["ENDINGS", "EndingTable", "compare_endings"]

ENDINGS = ("", "</think>", "\n", ".")


@dataclass(frozen=True)
class EndingTable:
    """Each kept prompt with each ending, in both models.

    Attributes:
        prompts: texts of the prompts.
        endings: what was put behind the first model's answer.
        end: float32 `[models, prompts, endings]`, probability that the text ends there.
        chosen: float32 `[models, prompts, endings, tokens]`, log-probability of the chosen tokens, in nats.
        likeliest: int32 `[models, prompts, endings]`, token put first.
        lengths: int `[models, prompts, endings]`, tokens that follow until the end, at most as many as were
            allowed; the end is one of them.
        ended: bool, same shape, whether it came.
    """

    prompts: tuple[str, ...]
    endings: tuple[str, ...]
    end: np.ndarray
    chosen: np.ndarray
    likeliest: np.ndarray
    lengths: np.ndarray
    ended: np.ndarray


def compare_endings(
    pair: DecisionPair,
    prompts: Sequence[StoppedPrompt],
    endings: Sequence[str] = ENDINGS,
    *,
    max_new_tokens: int = 64,
    batch: int = 8,
) -> EndingTable:
    """Appends each ending to the first model's answers, and lets both models go on.

    Args:
        pair: the two models.
        prompts: prompts with the first model's answers.
        endings: texts to append; the empty one leaves the answer as it is.
        max_new_tokens: largest number of tokens that are generated behind it.
        batch: contexts in one pass.
    """
    added = [pair.tokenizer.encode(text, add_special_tokens=False) if text else [] for text in endings]
    rows = [[*prompt.context, *ids] for prompt in prompts for ids in added]
    shape = (2, len(prompts), len(endings))
    read = np.stack([next_log_probs(one, rows, batch=batch) for one in pair.models])
    made = [answers_of(one, pair, rows, max_new_tokens, batch) for one in pair.models]
    lengths = np.array([[len(ids) for ids in answers] for answers in made])
    ended = np.array([[bool(ids) and ids[-1] in pair.ends for ids in answers] for answers in made])
    end = np.exp(read[..., list(pair.ends)].astype(np.float64)).sum(axis=-1)
    return EndingTable(
        tuple(prompt.prompt for prompt in prompts),
        tuple(endings),
        end.reshape(shape).astype(np.float32),
        read[..., pair.ids].reshape(*shape, -1),
        read.argmax(axis=-1).reshape(shape).astype(np.int32),
        lengths.reshape(shape),
        ended.reshape(shape),
    )
