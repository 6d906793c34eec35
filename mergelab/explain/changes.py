"""Which latents a model moved against another on the same contexts, by chance less often than one in twenty.

Values are means over a context's tokens, one context against the same in the other model. Where neither model
is different, which of the two a context's values belong to is a coin's toss: that is tossed many times over
all contexts together, and the largest statistic of any latent is what a real one has to exceed (Westfall and
Young 1993). One in twenty such searches then names any latent at all by chance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Changes", "find_changes", "found_by_chance", "retained"]

_BLOCK = 1 << 22
"""Elements of statistics that are held at once."""


@dataclass(frozen=True)
class Changes:
    """What was found, latent by latent.

    Attributes:
        difference: mean over contexts of the second model's value less the first's: float64 `[latents]`.
        statistic: it in standard errors, to which the median one is added: float64 `[latents]`.
        p: probability of so large a statistic of any latent by chance: float64 `[latents]`.
        level: probability below which a latent counts as moved.
    """

    difference: np.ndarray
    statistic: np.ndarray
    p: np.ndarray
    level: float

    @property
    def raised(self) -> np.ndarray:
        """The latents that the second model has more of, the surest first."""
        return self._chosen(self.difference > 0)

    @property
    def lowered(self) -> np.ndarray:
        """The latents that the second model has less of, the surest first."""
        return self._chosen(self.difference < 0)

    def _chosen(self, side: np.ndarray) -> np.ndarray:
        found = np.flatnonzero(side & (self.p <= self.level))
        return found[np.argsort(-np.abs(self.statistic[found]), kind="stable")]


def find_changes(
    first: np.ndarray, second: np.ndarray, *, draws: int = 999, level: float = 0.05, seed: int = 0
) -> Changes:
    """Compares the values of two models on the same contexts.

    Args:
        first: `[contexts, latents]`.
        second: the same of the other model.
        draws: number of tosses.
        level: probability of a false find among all latents.
        seed: seed of the tosses.
    """
    difference = np.asarray(second, np.float64) - first
    floor = _floor(difference)
    statistic = _statistics(np.ones((1, len(difference))), difference, floor)[0]
    largest = _largest(_signs(draws, len(difference), seed), difference, floor)
    above = len(largest) - np.searchsorted(np.sort(largest), np.abs(statistic), side="left")
    return Changes(difference.mean(axis=0), statistic, (1 + above) / (1 + draws), level)


def found_by_chance(first: np.ndarray, second: np.ndarray, *, shuffles: int = 19, seed: int = 0) -> float:
    """Control: how many latents count as raised, on average, where contexts are dealt at random."""
    draw = np.random.default_rng([seed, 1])
    total = 0
    for number in range(shuffles):
        swapped = draw.random(len(first)) < 0.5
        one, other = (np.where(swapped[:, None], a, b) for a, b in ((second, first), (first, second)))
        total += len(find_changes(one, other, draws=199, seed=seed + 1 + number).raised)
    return total / shuffles


def _signs(draws: int, count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).choice([-1.0, 1.0], (draws, count))


def _floor(difference: np.ndarray) -> float:
    """The median standard error of latents that differ anywhere, so that a rare one is not sure."""
    count = len(difference)
    errors = difference.std(axis=0, ddof=1) / np.sqrt(count) if count > 1 else np.zeros(difference.shape[1])
    there = errors[errors > 0]
    return float(np.median(there)) if there.size else 1.0


def _statistics(signs: np.ndarray, difference: np.ndarray, floor: float) -> np.ndarray:
    """`[draws, latents]`: mean over its standard error, after signs `[draws, contexts]` are changed."""
    count = len(difference)
    mean = signs @ difference / count
    square = (difference**2).sum(axis=0)
    variance = np.maximum(square - count * mean**2, 0) / max(count - 1, 1)
    return mean / (np.sqrt(variance / count) + floor)


def _largest(signs: np.ndarray, difference: np.ndarray, floor: float) -> np.ndarray:
    """The largest statistic of any latent in each draw."""
    found = np.zeros(len(signs))
    step = max(1, _BLOCK // len(signs))
    for start in range(0, difference.shape[1], step):
        part = np.abs(_statistics(signs, difference[:, start : start + step], floor))
        found = np.maximum(found, part.max(axis=1))
    return found


def retained(
    base: np.ndarray, specialist: np.ndarray, merge: np.ndarray, *, draws: int = 999, seed: int = 0
) -> np.ndarray:
    """`(merge - base) / (specialist - base)` of each latent's mean, with a bootstrap interval over contexts.

    Args:
        base: `[contexts, latents]`.
        specialist: the same.
        merge: the same.
        draws: resamples of contexts.
        seed: their seed.

    Returns:
        The share, and the ends of the interval that holds 95 % of the resamples: float64 `[3, latents]`.
    """
    count = len(base)
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), draws) / count
    weights = np.concatenate([np.full((1, count), 1 / count), weights])
    gained, kept = weights @ (specialist - base), weights @ (merge - base)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = kept / gained
    low, high = np.nanquantile(shares[1:], [0.025, 0.975], axis=0)
    # A gain whose sign changes between resamples has shares without bounds.
    return np.nan_to_num(np.stack([shares[0], low, high]), nan=0.0, posinf=1e6, neginf=-1e6)
