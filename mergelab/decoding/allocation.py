"""Votes that stop when they are decided, and how sure a vote is so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

from mergelab.decoding.transforms import require

__all__ = ["Vote", "adaptive_vote", "expected_votes", "vote_confidence", "vote_is_decided"]


@dataclass(frozen=True)
class Vote:
    """What a vote came to.

    Attributes:
        answer: the one with most votes, of equal ones the one that was given first; None where nobody gave
            one.
        counts: votes by answer, or their weights, in the order in which answers were first given.
        used: number of votes, those without an answer among them.
    """

    answer: Hashable | None
    counts: Mapping[Hashable, float]
    used: int


def vote_is_decided(counts: Mapping[Hashable, float], left: int) -> bool:
    """Whether the votes that are left can no longer change which answer has most of them.

    Args:
        counts: votes by answer so far.
        left: number of votes still to come.

    Raises:
        DecodingError: `left` is negative.
    """
    require("vote_is_decided(left)", left, left >= 0, "0 or more votes")
    ranked = sorted(counts.values(), reverse=True)
    first, second = [*ranked, 0, 0][:2]
    return left == 0 or first - second > left


def vote_confidence(counts: Mapping[Hashable, float]) -> float:
    """Probability that the leading answer is likelier than the next one, given their votes so far.

    `1 - I_{1/2}(v1 + 1, v2 + 1)`: both shares being equally likely to be anything before (Aggarwal et al.,
    adaptive consistency, arXiv:2305.11860). One half without any votes.
    """
    from scipy.special import betainc

    ranked = sorted(counts.values(), reverse=True)
    first, second = [*ranked, 0, 0][:2]
    return 1.0 - float(betainc(first + 1, second + 1, 0.5))


def adaptive_vote(answers: Iterable[Hashable | None], most: int, *, confidence: float | None = None) -> Vote:
    """Takes answers until the vote is decided.

    Without `confidence` the winner is that of all `most` votes, whatever they would have been (up to ties,
    which go to the earlier answer).

    Args:
        answers: answers as they come; they are asked for one by one, and None is a vote for nothing.
        most: most votes that are taken.
        confidence: also stop once `vote_confidence` is at least this.

    Raises:
        DecodingError: `most` is not positive, or `confidence` is not between 0 and 1.
    """
    require("adaptive_vote(most)", most, most >= 1, "at least 1 vote")
    inside = confidence is None or 0 < confidence < 1
    require("adaptive_vote(confidence)", confidence, inside, "a number between 0 and 1, or None")
    counts: Counter[Hashable] = Counter()
    used = 0
    for answer in answers:
        used += 1
        if answer is not None:
            counts[answer] += 1
        sure = confidence is not None and bool(counts) and vote_confidence(counts) >= confidence
        if used >= most or sure or vote_is_decided(counts, most - used):
            break
    best = max(counts, key=lambda answer: counts[answer]) if counts else None
    return Vote(best, dict(counts), used)


def expected_votes(p: float, most: int) -> float:
    """Mean number of votes of `adaptive_vote` for two answers, of which one is given with probability `p`.

    Raises:
        DecodingError: `p` is not a probability, or `most` is not positive.
    """
    require("expected_votes(p)", p, 0 <= p <= 1, "a probability")
    require("expected_votes(most)", most, most >= 1, "at least 1 vote")
    undecided, mean = {(0, 0): 1.0}, 0.0
    for used in range(1, most + 1):
        mean += sum(undecided.values())
        after: dict[tuple[int, int], float] = {}
        for (ones, others), chance in undecided.items():
            for state, part in (((ones + 1, others), p), ((ones, others + 1), 1 - p)):
                if abs(state[0] - state[1]) <= most - used:
                    after[state] = after.get(state, 0.0) + chance * part
        undecided = after
    return mean
