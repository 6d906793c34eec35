"""Accuracy of several attempts, in closed form: pass@k, majority votes, intervals."""

from __future__ import annotations

import math

from mergelab.decoding.transforms import require

__all__ = ["accuracy_interval", "best_of_n_kl", "majority_accuracy", "pass_at_k", "pass_at_k_interval"]


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate of the probability that one of `k` attempts is right, `1 - C(n-c, k) / C(n, k)`.

    From Chen et al., arXiv:2107.03374. `1 - (1 - c/n)^k` is biased: with p = 0.3 and 20 attempts it gives
    0.796 for k = 5 on average, where the truth is 0.832.

    >>> round(pass_at_k(20, 6, 5), 4)
    0.8709

    Args:
        n: number of attempts that were made.
        correct: number of those that are right.
        k: number of attempts that one has, at most `n`.

    Raises:
        DecodingError: a number is out of its range.
    """
    _check_counts("pass_at_k", n, correct)
    require("pass_at_k(k)", k, _whole(k) and 1 <= k <= n, f"1 to the {n} attempts that were made")
    if n - correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - correct + 1, n + 1))


def pass_at_k_interval(n: int, correct: int, k: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Bounds of the probability that one of `k` attempts is right, from `n` attempts at one task.

    `1 - (1 - p)^k` at the bounds of `p` (Clopper and Pearson, which hold at least so often), widened to the
    estimate `pass_at_k` where that lies outside.

    Args:
        n: number of attempts that were made.
        correct: number of those that are right.
        k: number of attempts that one has, at most `n`.
        confidence: how often the bounds hold.

    Raises:
        DecodingError: a number is out of its range.
    """
    estimate = pass_at_k(n, correct, k)
    low, high = (1.0 - (1.0 - bound) ** k for bound in accuracy_interval(correct, n, confidence=confidence))
    return min(low, estimate), max(high, estimate)


def accuracy_interval(correct: int, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Bounds of a probability of which `correct` of `n` draws are known, exact (Clopper and Pearson 1934).

    Args:
        correct: number of draws that are right.
        n: number of draws.
        confidence: how often the bounds hold, at least.

    Raises:
        DecodingError: a number is out of its range.
    """
    from scipy.special import betaincinv

    _check_counts("accuracy_interval", n, correct)
    require("confidence", confidence, 0 < confidence < 1, "a number between 0 and 1")
    tail = (1.0 - confidence) / 2
    low = 0.0 if correct == 0 else float(betaincinv(correct, n - correct + 1, tail))
    high = 1.0 if correct == n else float(betaincinv(correct + 1, n - correct, 1.0 - tail))
    return low, high


def majority_accuracy(p: float, n: int) -> float:
    """Probability that most of `n` independent votes are right, each being right with probability `p`.

    Of two answers; a tie is decided by a coin. Votes help where `p` is above one half, and hurt below.

    >>> [round(majority_accuracy(0.6, n), 3) for n in (3, 11, 51)]
    [0.648, 0.753, 0.926]

    Args:
        p: probability that a vote is right.
        n: number of votes, at least 1.

    Raises:
        DecodingError: a number is out of its range.
    """
    require("majority_accuracy(p)", p, 0 <= p <= 1, "a probability")
    require("majority_accuracy(n)", n, _whole(n) and n >= 1, "at least 1 vote")
    won = sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n // 2 + 1, n + 1))
    tie = math.comb(n, n // 2) * (p * (1 - p)) ** (n // 2) / 2 if n % 2 == 0 else 0.0
    return float(won + tie)


def best_of_n_kl(n: int) -> float:
    """Bound of the KL divergence, in nats, of the best of `n` samples from one sample: `log n - (n-1)/n`.

    Raises:
        DecodingError: `n` is not positive.
    """
    require("best_of_n_kl(n)", n, _whole(n) and n >= 1, "at least 1 sample")
    return math.log(n) - (n - 1) / n


def _whole(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


def _check_counts(name: str, n: int, correct: int) -> None:
    require(f"{name}(n)", n, _whole(n) and n >= 1, "at least 1 attempt")
    require(f"{name}(correct)", correct, _whole(correct) and 0 <= correct <= n, f"0 to the {n} attempts")
