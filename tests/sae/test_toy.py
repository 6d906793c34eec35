"""The toy ground truth has the statistics it promises, and any row can be drawn without those before it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mergelab.activations import ActivationSource, ActivationStream
from mergelab.errors import SAEError
from mergelab.sae.toy import BLOCK_ROWS, ToyGroundTruth

SMALL = ToyGroundTruth(d_in=16, n_features=48, l0=3.0, rows=40 * BLOCK_ROWS)


def test_features_are_unit_and_without_direction() -> None:
    features = ToyGroundTruth().features
    assert features.shape == (1024, 128) and features.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-6)
    # The mean of n directions uniform on a sphere has norm about 1 / sqrt(n).
    assert np.linalg.norm(features.mean(axis=0)) < 2 / np.sqrt(1024)
    cosines = features @ features.T
    np.fill_diagonal(cosines, 0)
    assert abs(cosines.std() - 1 / np.sqrt(128)) < 0.002


@pytest.mark.parametrize("exponent", [0.0, 0.6, 1.5])
@pytest.mark.parametrize("l0", [3.0, 20.0, 48.0])
def test_probabilities_follow_the_power_law_and_sum_to_l0(exponent: float, l0: float) -> None:
    found = replace(SMALL, exponent=exponent, l0=l0).probabilities
    assert found.sum() == pytest.approx(l0) and found.max() <= 1 and (np.diff(found) <= 1e-15).all()
    free = found[found < 1]
    ranks = np.arange(1, 49)[found < 1]
    if len(free) > 1:
        slope = np.diff(np.log(free)) / np.diff(np.log(ranks))
        np.testing.assert_allclose(slope, -exponent, atol=1e-9)


def test_features_are_on_as_often_and_as_strongly_as_promised() -> None:
    codes = SMALL.codes(0, SMALL.rows)
    on = codes > 0
    expected = SMALL.probabilities
    deviation = np.sqrt(expected * (1 - expected) / SMALL.rows)
    assert (np.abs(on.mean(axis=0) - expected) < 5 * deviation).all()
    assert on.sum(axis=1).mean() == pytest.approx(3.0, abs=0.05)
    magnitudes = codes[on]
    assert magnitudes.mean() == pytest.approx(np.sqrt(2 / np.pi), abs=0.01)  # of a half-normal
    assert (magnitudes**2).mean() == pytest.approx(1, abs=0.02)


def test_rows_are_the_codes_times_the_features() -> None:
    source = replace(SMALL, mean_norm=2.0)
    rows = source.read(100, 3000)
    np.testing.assert_allclose(rows, source.codes(100, 3000) @ source.features + source.mean, atol=1e-5)
    assert np.linalg.norm(source.mean) == pytest.approx(2.0)
    assert (rows.dtype, rows.shape, source.d_out) == (np.float32, (2900, 16), 16)


def test_reading_may_start_anywhere() -> None:
    whole = SMALL.read(0, 5 * BLOCK_ROWS)
    pieces = [SMALL.read(start, start + 700) for start in range(0, 4200, 700)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole[:4200])
    np.testing.assert_array_equal(replace(SMALL, rows=1500).read(1200, 1500), whole[1200:1500])
    assert SMALL.read(7, 7).shape == (0, 16)
    # Rows do not repeat from block to block, nor from seed to seed.
    assert not np.isclose(whole[:BLOCK_ROWS], whole[BLOCK_ROWS : 2 * BLOCK_ROWS]).any(axis=1).all()
    assert not np.array_equal(replace(SMALL, seed=1).read(0, 10), whole[:10])
    assert not np.array_equal(replace(SMALL, seed=1).features, SMALL.features)


def test_it_is_a_source_that_streams_and_resumes() -> None:
    source: ActivationSource = replace(SMALL, rows=4000)
    assert isinstance(source, ActivationSource)
    stream = ActivationStream(source, 500, seed=1, buffer_rows=2048)
    batches = [next(stream) for _ in range(10)]  # into a second epoch
    for batch in batches:
        np.testing.assert_array_equal(batch.input, source.read(0, 4000)[batch.rows])
    again = ActivationStream(source, 500, seed=1, buffer_rows=2048)
    for _ in range(6):
        next(again)
    resumed = ActivationStream(source, 500, seed=1, buffer_rows=2048)
    resumed.restore(again.state())
    np.testing.assert_array_equal(next(resumed).input, batches[6].input)


def test_a_sample_is_its_own_rows() -> None:
    sample = SMALL.sample(1500, seed=3)
    np.testing.assert_array_equal(SMALL.sample(1500, seed=3), sample)
    assert sample.shape == (1500, 16) and SMALL.sample(0).shape == (0, 16)
    read = {row.tobytes() for row in SMALL.read(0, 8 * BLOCK_ROWS) if row.any()}
    other = {row.tobytes() for row in SMALL.sample(1500, seed=4) if row.any()}
    assert not read & {row.tobytes() for row in sample}
    assert not other & {row.tobytes() for row in sample}


def test_groups_are_on_together_and_keep_their_frequencies() -> None:
    grouped = replace(SMALL, l0=1.5, group_size=4, lift=6.0)
    on = grouped.codes(0, grouped.rows) > 0
    together = (on.T.astype(np.float32) @ on.astype(np.float32)) / grouped.rows
    chance = np.outer(grouped.probabilities, grouped.probabilities)
    np.testing.assert_allclose(on.mean(axis=0), grouped.probabilities, rtol=0.15)
    same = np.arange(48)[:, None] // 4 == np.arange(48)[None, :] // 4
    pairs = ~np.eye(48, dtype=bool)
    assert (together / chance)[same & pairs].mean() == pytest.approx(6, rel=0.1)
    assert (together / chance)[~same].mean() == pytest.approx(1, rel=0.05)


def test_a_group_of_frequent_features_has_less_lift_and_keeps_its_frequencies() -> None:
    grouped = replace(SMALL, n_features=10, l0=4.0, group_size=4, lift=100.0)  # 10 = 4 + 4 + 2
    on = grouped.codes(0, grouped.rows) > 0
    np.testing.assert_allclose(on.mean(axis=0), grouped.probabilities, rtol=0.05)


def test_noise_adds_its_variance_to_every_coordinate() -> None:
    noisy = replace(SMALL, noise=0.5)
    difference = noisy.read(0, 20_000) - SMALL.read(0, 20_000)
    np.testing.assert_allclose(difference.std(axis=0), 0.5, rtol=0.03)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_features": 0}, "n_features of the toy ground truth is 0"),
        ({"l0": 49.0}, "at most n_features=48"),
        ({"l0": float("nan")}, "l0 of the toy ground truth is nan"),
        ({"exponent": -1.0}, "exponent of the toy ground truth is -1.0"),
        ({"lift": 0.5}, "lift of the toy ground truth is 0.5"),
        ({"seed": -1}, "seed of the toy ground truth is -1"),
    ],
)
def test_impossible_truths_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(SAEError, match=message):
        replace(SMALL, **change)


def test_rows_it_does_not_have_are_refused() -> None:
    with pytest.raises(
        SAEError, match="rows 10 to 41 were asked of a toy ground truth that has rows 0 to 40"
    ):
        replace(SMALL, rows=40).read(10, 41)
