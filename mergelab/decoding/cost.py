"""What answers cost: tokens at prices, retries, and the mix of a cheap and a dear way to answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mergelab.decoding.transforms import require

__all__ = [
    "Prices",
    "Retried",
    "Usage",
    "correct_answers_for",
    "escalation_saving",
    "mixed_cost",
    "retry_failures",
]


@dataclass(frozen=True)
class Usage:
    """Tokens of one request.

    Attributes:
        prompt: tokens that are read.
        reasoning: tokens that are thought; they are paid as completion tokens, among which they are counted.
        answer: tokens that are shown.
    """

    prompt: int
    reasoning: int = 0
    answer: int = 0

    def __post_init__(self) -> None:
        for name in ("prompt", "reasoning", "answer"):
            count = getattr(self, name)
            require(f"Usage({name})", count, count >= 0, "0 or more tokens")

    @property
    def completion(self) -> int:
        """Tokens that are generated."""
        return self.reasoning + self.answer


@dataclass(frozen=True)
class Prices:
    """Dollars per million tokens.

    >>> Prices(15, 60).of(Usage(prompt=15, reasoning=2847, answer=20))
    0.172245

    Attributes:
        prompt: price of tokens that are read.
        completion: price of tokens that are generated, reasoning among them.
    """

    prompt: float
    completion: float

    def __post_init__(self) -> None:
        for name in ("prompt", "completion"):
            _check_dollars(f"Prices({name})", getattr(self, name))

    def of(self, usage: Usage) -> float:
        """Dollars of one request."""
        return (usage.prompt * self.prompt + usage.completion * self.completion) / 1e6


@dataclass(frozen=True)
class Retried:
    """What a second attempt at every failure comes to.

    Attributes:
        correct: expected number of right answers.
        cost: expected dollars, those of the first attempts among them.
        retries: expected number of second attempts.
        needs_verifier: True: who cannot tell a failure cannot retry it.
    """

    correct: float
    cost: float
    retries: float
    needs_verifier: bool = True


def correct_answers_for(budget: float, each: float, accuracy: float) -> float:
    """Expected number of right answers that a budget buys, each attempt being at a task of its own.

    >>> correct_answers_for(100, 1, 0.68), round(correct_answers_for(100, 10, 0.92), 2)
    (68.0, 9.2)

    Args:
        budget: dollars.
        each: dollars of an attempt.
        accuracy: probability that an attempt is right.

    Raises:
        DecodingError: a number is out of its range.
    """
    _check_dollars("budget", budget)
    require("each", each, 0 < each < math.inf, "a positive number of dollars")
    require("accuracy", accuracy, 0 <= accuracy <= 1, "a probability")
    return budget / each * accuracy


def retry_failures(tasks: int, accuracy: float, each: float) -> Retried:
    """One more attempt at each of `tasks` whose first attempt failed, as a perfect verifier tells.

    Args:
        tasks: number of tasks.
        accuracy: probability that an attempt is right, the second independent of the first.
        each: dollars of an attempt.

    Raises:
        DecodingError: a number is out of its range.
    """
    require("tasks", tasks, tasks >= 0, "0 or more tasks")
    require("accuracy", accuracy, 0 <= accuracy <= 1, "a probability")
    _check_dollars("each", each)
    failed = tasks * (1 - accuracy)
    return Retried(tasks * accuracy + failed * accuracy, (tasks + failed) * each, failed)


def mixed_cost(requests: float, parts: Sequence[tuple[float, float]]) -> float:
    """Dollars of requests that are answered in several ways.

    Args:
        requests: number of requests.
        parts: share of the requests and dollars of one, for each way; the shares add up to 1.

    Raises:
        DecodingError: shares that are negative or do not add up, or a price that is none.
    """
    require("requests", requests, 0 <= requests < math.inf, "0 or more")
    shares = [share for share, _ in parts]
    adds_up = all(share >= 0 for share in shares) and math.isclose(sum(shares), 1.0, abs_tol=1e-9)
    require("mixed_cost(parts)", shares, adds_up, "shares that add up to 1")
    for _, each in parts:
        _check_dollars("mixed_cost(parts)", each)
    return requests * sum(share * each for share, each in parts)


def escalation_saving(
    requests: float, before: float, after: float, each: float, *, cost: float = 0.0
) -> float:
    """Dollars that are left of fewer escalations (to a person, say), less what it takes to have fewer.

    >>> escalation_saving(1_000_000, 0.35, 0.15, 5, cost=95_500)
    904500.0

    Args:
        requests: number of requests.
        before: share of them that was escalated.
        after: share that is escalated now.
        each: dollars of an escalation.
        cost: dollars of what made the difference.

    Raises:
        DecodingError: a number is out of its range.
    """
    require("requests", requests, 0 <= requests < math.inf, "0 or more")
    for name, share in (("before", before), ("after", after)):
        require(name, share, 0 <= share <= 1, "a share from 0 to 1")
    _check_dollars("each", each)
    _check_dollars("cost", cost)
    return round(requests * before * each - requests * after * each - cost, 6)


def _check_dollars(name: str, dollars: float) -> None:
    require(name, dollars, 0 <= dollars < math.inf, "0 or more dollars")
