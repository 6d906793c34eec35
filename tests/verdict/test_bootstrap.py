"""Intervals and probabilities of the bootstrap, beside scipy's and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from mergelab.verdict import difference, estimate, resampled_sums

RANDOM = np.random.default_rng(5)
BYTES = RANDOM.integers(50, 900, 60).astype(float)
BITS = BYTES * RANDOM.normal(1.2, 0.3, 60)
BETTER = BITS - BYTES * RANDOM.normal(0.02, 0.03, 60)


def test_the_interval_of_a_ratio_is_that_of_scipy() -> None:
    sums = resampled_sums(np.stack([BITS, BYTES], axis=1), draws=20000)
    found = estimate(sums[:, 0], sums[:, 1], 60)
    theirs = scipy.stats.bootstrap(
        (BITS, BYTES),
        lambda a, b, axis: a.sum(axis) / b.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=20000,
        random_state=np.random.default_rng(1),
    )
    assert found.value == pytest.approx(BITS.sum() / BYTES.sum(), rel=1e-12)
    assert found.interval is not None
    # Both ends are quantiles of 20,000 draws: three standard errors of them are 5 % of a deviation.
    assert found.interval == pytest.approx(
        tuple(theirs.confidence_interval), abs=0.05 * theirs.standard_error
    )
    assert found.value != pytest.approx((BITS / BYTES).mean(), abs=1e-3), "documents weigh by their bytes"


def test_the_interval_of_a_mean_is_the_normal_one() -> None:
    values = RANDOM.normal(3, 2, 400)
    sums = resampled_sums(np.stack([values, np.ones(400)], axis=1), draws=8000)
    found = estimate(sums[:, 0], sums[:, 1], 400).interval
    assert found is not None
    half = 1.96 * values.std() / 20
    assert found == pytest.approx((values.mean() - half, values.mean() + half), abs=0.08 * half)


def test_pairing_sees_what_two_intervals_hide() -> None:
    sums = resampled_sums(np.stack([BITS, BYTES, BETTER, BYTES], axis=1)).T
    alone = [estimate(sums[i], sums[i + 1], 60).interval for i in (0, 2)]
    assert alone[0] is not None and alone[1] is not None and alone[1][1] > alone[0][0], "they overlap"
    found = difference((sums[0], sums[1]), (sums[2], sums[3]), 60)
    assert found.value < 0 and found.interval is not None and found.interval[1] < 0
    assert found.p is not None and found.p < 0.01
    shuffled = RANDOM.permutation(60)
    unpaired = resampled_sums(np.stack([BITS, BYTES, BETTER[shuffled], BYTES[shuffled]], axis=1)).T
    broken = difference((unpaired[0], unpaired[1]), (unpaired[2], unpaired[3]), 60)
    assert broken.p is not None and broken.p > 0.2, "a comparison of other units must not find it"


def test_no_difference_is_rarely_one() -> None:
    """Of 400 comparisons of equals, about 5 % have p < 0.05, and p agrees with the interval."""
    found = []
    for seed in range(400):
        random = np.random.default_rng(seed)
        a, b, ones = random.normal(size=50), random.normal(size=50), np.ones(50)
        sums = resampled_sums(np.stack([a, b, ones], axis=1), draws=200, seed=seed).T
        one = difference((sums[0], sums[2]), (sums[1], sums[2]), 50)
        assert one.interval is not None and one.p is not None
        outside = one.interval[0] > 0 or one.interval[1] < 0
        assert (one.p < 0.05) == outside or abs(one.p - 0.05) < 0.02
        found.append(one.p < 0.05)
    assert 0.02 < np.mean(found) < 0.10


def test_one_unit_has_no_interval() -> None:
    sums = resampled_sums(np.array([[2.0, 4.0]])).T
    assert estimate(sums[0], sums[1], 1).to_dict() == {"value": 0.5, "interval": None}
    assert difference((sums[0], sums[1]), (sums[0], sums[1]), 1).p is None


def test_units_without_a_token_do_not_make_nan() -> None:
    columns = np.array([[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]])
    found = estimate(*resampled_sums(columns).T, 3)
    assert found.value == 0.5 and found.interval == (0.5, 0.5)
