"""Recovery of features against hand-made decoders and scipy's assignment by brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mergelab.errors import SAEError
from mergelab.sae.features.matching import matched_cosine, max_cosines, recovery


def _directions(rows: int, width: int, seed: int = 0) -> np.ndarray:
    drawn = np.random.default_rng(seed).standard_normal((rows, width))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def test_a_shuffled_and_scaled_truth_is_recovered_whole() -> None:
    truth = _directions(1500, 24)
    rng = np.random.default_rng(1)
    decoder = rng.permutation(
        np.concatenate([truth * rng.uniform(0.5, 3, (1500, 1)), _directions(300, 24, 2)])
    )
    found = recovery(truth, decoder)
    assert found.mean_max_cosine == pytest.approx(1, abs=1e-6) and found.above == 1
    assert matched_cosine(truth[:200], decoder) == pytest.approx(1, abs=1e-6)


def test_half_a_truth_is_half_recovered() -> None:
    truth = np.eye(8, dtype=np.float32)
    found = recovery(truth, truth[:4])
    assert (found.mean_max_cosine, found.above) == (0.5, 0.5)
    assert recovery(truth, -truth).mean_max_cosine == 0.0  # an opposite direction is not the feature
    assert recovery(truth, np.zeros((3, 8), np.float32)).mean_max_cosine == 0.0


def test_rows_of_signed_codes_count_whichever_way_they_point() -> None:
    truth = _directions(6, 8)
    turned = truth * np.array([1, -1, 1, -1, 1, -1], np.float32)[:, None]
    found = recovery(truth, turned, either_sign=True)
    assert found.mean_max_cosine == pytest.approx(1, abs=1e-6) and found.above == 1
    assert recovery(truth, turned).above == 0.5


def test_the_threshold_is_what_above_counts_from() -> None:
    truth = np.eye(2, dtype=np.float32)
    tilted = np.array([[0.8, 0.6], [0.0, 1.0]], np.float32)
    np.testing.assert_allclose(max_cosines(truth, tilted), [0.8, 1.0], atol=1e-6)
    assert (recovery(truth, tilted).above, recovery(truth, tilted, threshold=0.7).above) == (0.5, 1.0)


def test_one_row_cannot_stand_for_two_features_when_matched() -> None:
    truth = np.array([[1, 0], [1, 0.1]], np.float32)
    decoder = np.array([[1, 0.05], [-1, 0]], np.float32)
    assert recovery(truth, decoder).mean_max_cosine > 0.99
    assert matched_cosine(truth, decoder) < 0.01


@pytest.mark.parametrize("rows", [4, 5, 7])
def test_matching_agrees_with_all_assignments(rows: int) -> None:
    truth, decoder = _directions(5, 3), _directions(rows, 3, seed=rows)
    cosines = truth @ decoder.T
    if rows >= 5:
        best = max(cosines[range(5), chosen].mean() for chosen in itertools.permutations(range(rows), 5))
    else:
        best = max(cosines[chosen, range(rows)].mean() for chosen in itertools.permutations(range(5), rows))
    assert matched_cosine(truth, decoder) == pytest.approx(best, abs=1e-6)


def test_what_cannot_be_compared_is_refused() -> None:
    truth = _directions(4, 3)
    with pytest.raises(SAEError, match=r"features of shape \[4, 3\] cannot be compared"):
        recovery(truth, _directions(4, 2))
    truth[2] = 0
    with pytest.raises(SAEError, match="feature 2 has norm 0"):
        recovery(truth, truth)
