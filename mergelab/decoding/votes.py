"""Votes among texts: self-consistency, votes weighted by a verifier or by confidence, and best of n."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Sequence
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from mergelab.decoding.allocation import Vote
from mergelab.decoding.transforms import require

__all__ = [
    "best_of_n",
    "boxed_answer",
    "last_number",
    "lowest_group_confidence",
    "self_consistency",
    "step_score",
    "tail_confidence",
    "weighted_vote",
]

T = TypeVar("T")
Extract = Callable[[str], Hashable | None]
"""What a text answers, in a form in which equal answers are equal; None where it does not answer."""


def last_number(text: str) -> str | None:
    """The last number of a text, as a plain decimal: without commas between thousands, and without `.0`.

    >>> last_number("So 1,234.50 + 1 = 1,235.50."), last_number("none")
    ('1235.5', None)
    """
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    if not found:
        return None
    whole, point, rest = found[-1].replace(",", "").partition(".")
    sign, digits = ("-", whole[1:]) if whole.startswith("-") else ("", whole)
    plain = (digits.lstrip("0") or "0") + (point + rest).rstrip("0").rstrip(".")
    return plain if plain == "0" else sign + plain


def boxed_answer(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}` of a text, braces in it matched; None without one.

    >>> boxed_answer(r"so \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    """
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    depth = 1
    for place in range(start + 7, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start + 7 : place].strip()
    return None


def self_consistency(texts: str | Sequence[str], extract: Extract = last_number) -> Vote:
    """The answer that most texts come to (Wang et al., arXiv:2203.11171), of equal ones the earlier.

    Args:
        texts: samples of one prompt.
        extract: what a text answers; None is a vote for nothing.

    Raises:
        DecodingError: there are no texts.
    """
    answers = [extract(text) for text in ([texts] if isinstance(texts, str) else texts)]
    found = weighted_vote(answers, np.ones(len(answers)))
    counts = {answer: answers.count(answer) for answer in found.counts}
    return Vote(found.answer, counts, found.used)


def weighted_vote(answers: Sequence[Hashable | None], weights: ArrayLike) -> Vote:
    """The answer whose votes weigh most; weights are a verifier's scores, or confidences.

    Args:
        answers: what each text answers; None is a vote for nothing.
        weights: weight of each vote, at least 0.

    Returns:
        The vote, with weights in place of counts.

    Raises:
        DecodingError: there are no answers, not as many weights, or one that is negative or not finite.
    """
    given = np.asarray(weights, np.float64).reshape(-1)
    require("weighted_vote(answers)", len(answers), len(answers) >= 1, "at least one")
    require("weighted_vote(weights)", given.size, given.size == len(answers), f"{len(answers)} of them")
    good = bool((np.isfinite(given) & (given >= 0)).all())
    require("weighted_vote(weights)", given.tolist()[:8], good, "finite numbers of at least 0")
    totals: dict[Hashable, float] = {}
    for answer, weight in zip(answers, given.tolist(), strict=True):
        if answer is not None:
            totals[answer] = totals.get(answer, 0.0) + weight
    best = max(totals, key=lambda answer: totals[answer]) if totals else None
    return Vote(best, totals, len(answers))


def step_score(scores: ArrayLike, how: Literal["min", "product", "last"] = "min") -> float:
    """One score of a text from a process reward model's scores of its steps.

    Args:
        scores: probability that each step is right.
        how: the least of them, their product, or the last.

    Raises:
        DecodingError: there are no scores, one is no probability, or `how` is another word.
    """
    steps = np.asarray(scores, np.float64).reshape(-1)
    require("step_score(scores)", steps.size, steps.size >= 1, "at least one step")
    inside = bool(((steps >= 0) & (steps <= 1)).all())
    require("step_score(scores)", steps.tolist()[:8], inside, "probabilities")
    require("step_score(how)", how, how in ("min", "product", "last"), "min, product or last")
    return float({"min": steps.min(), "product": steps.prod(), "last": steps[-1]}[how])


def best_of_n(candidates: Sequence[T], verify: Callable[[T], float]) -> tuple[T, list[float]]:
    """The candidate that a verifier scores highest, of equal ones the first; and all scores.

    Args:
        candidates: texts, completions, or anything that the verifier takes.
        verify: score of a candidate.

    Raises:
        DecodingError: there are no candidates, or a score is NaN.
    """
    require("best_of_n(candidates)", len(candidates), len(candidates) >= 1, "at least one")
    scores = [float(verify(candidate)) for candidate in candidates]
    require("best_of_n(verify)", scores[:8], not any(map(math.isnan, scores)), "scores that are not NaN")
    return candidates[scores.index(max(scores))], scores


def lowest_group_confidence(confidences: ArrayLike, window: int = 2048) -> float:
    """DeepConf's weight of a text: the least mean confidence of any `window` tokens in a row (2508.15260).

    Args:
        confidences: confidence of each token, the negative of what `confidence_monitor` reads.
        window: number of tokens; of a shorter text the mean of all.

    Raises:
        DecodingError: there are no tokens, or the window is empty.
    """
    values = _confidences("lowest_group_confidence", confidences, window)
    size = min(window, values.size)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return float((sums[size:] - sums[:-size]).min() / size)


def tail_confidence(confidences: ArrayLike, window: int = 2048) -> float:
    """DeepConf's tail confidence: the mean confidence of the last `window` tokens.

    Args:
        confidences: same as in `lowest_group_confidence`.
        window: number of tokens.

    Raises:
        DecodingError: there are no tokens, or the window is empty.
    """
    return float(_confidences("tail_confidence", confidences, window)[-window:].mean())


def _confidences(name: str, confidences: ArrayLike, window: int) -> np.ndarray:
    values = np.asarray(confidences, np.float64).reshape(-1)
    require(f"{name}(confidences)", values.size, values.size >= 1, "at least one token")
    require(f"{name}(window)", window, window >= 1, "at least 1 token")
    return values
