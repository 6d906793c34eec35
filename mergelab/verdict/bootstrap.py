"""Bootstrap intervals of ratios of sums, and paired differences: all from the same resamples of the units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

__all__ = ["DRAWS", "LEVEL", "Difference", "Estimate", "difference", "estimate", "resampled_sums", "shown"]

DRAWS = 2000
"""Resamples."""

LEVEL = 0.95
"""Probability of the intervals."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval.

    Attributes:
        value: figure on all units.
        interval: lower and upper end of the percentile interval; None where there are too few units for one.
    """

    value: float
    interval: tuple[float, float] | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"value": self.value, "interval": None if self.interval is None else list(self.interval)}


@dataclass(frozen=True)
class Difference(Estimate):
    """A paired difference with its interval.

    Attributes:
        p: two-sided probability, of a difference at least as far from none if there were none; None where
            there are too few units. It is below 0.05 where the interval of 95 % does not hold 0.
    """

    p: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**super().to_dict(), "p": self.p}


def resampled_sums(
    columns: Float[np.ndarray, "units columns"], *, draws: int = DRAWS, seed: int = 0
) -> Float[np.ndarray, "sums columns"]:
    """Sums of columns over all units, then over each of `draws` resamples of them, drawn with replacement.

    All columns are summed over the same resamples: two models that were measured on the same units are
    compared unit by unit (Efron and Tibshirani, An Introduction to the Bootstrap, 1993; of the paired form in
    language processing: Koehn, Statistical Significance Tests for Machine Translation Evaluation, 2004).

    Args:
        columns: what is summed, float64, a row for each document or task.
        draws: number of resamples.
        seed: seed of the draws; the same for the same number of units.
    """
    count = len(columns)
    random = np.random.default_rng(seed)
    found = np.empty((draws + 1, columns.shape[1]))
    found[0] = columns.sum(axis=0)
    for row in found[1:]:
        row[:] = np.bincount(random.integers(count, size=count), minlength=count) @ columns
    return found


def estimate(
    numerator: Float[np.ndarray, " sums"], denominator: Float[np.ndarray, " sums"], units: int
) -> Estimate:
    """A ratio of sums with its interval.

    Args:
        numerator: sums as `resampled_sums` gives them.
        denominator: the same of what they are divided by.
        units: number of units that were resampled.
    """
    ratios = _ratios(numerator, denominator)
    return Estimate(float(ratios[0]), _interval(ratios[1:], units))


def difference(
    one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray], units: int
) -> Difference:
    """`other - one` of two ratios of sums over the same resamples, numerator and denominator of each."""
    found = _ratios(*other) - _ratios(*one)
    drawn = found[1:]
    p = None
    if units > 1:
        # With a draw of the null added, no probability is 0 (Davison and Hinkley 1997, 4.2.5).
        sides = [(1 + np.sum(drawn <= 0)) / (1 + len(drawn)), (1 + np.sum(drawn >= 0)) / (1 + len(drawn))]
        p = float(min(1.0, 2 * min(sides)))
    return Difference(float(found[0]), _interval(drawn, units), p)


def _ratios(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    # A resample may hold nothing but units without a token of a tokenizer.
    return numerator / np.where(denominator == 0, np.nan, denominator)


def _interval(drawn: np.ndarray, units: int) -> tuple[float, float] | None:
    drawn = drawn[np.isfinite(drawn)]
    if units < 2 or not drawn.size:
        return None
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def shown(found: Estimate | Mapping[str, Any], digits: int = 4) -> str:
    """`0.8123 [0.8011, 0.8240]`, of an estimate or its plain data."""
    data = found.to_dict() if isinstance(found, Estimate) else found
    interval = data["interval"]
    ends = "" if interval is None else f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"
    return f"{data['value']:.{digits}f}{ends}"
