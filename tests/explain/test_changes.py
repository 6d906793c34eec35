"""The criterion finds what was planted and no more than one search in twenty by chance."""

from __future__ import annotations

import numpy as np
import pytest

from mergelab.explain import fate_of, find_changes, retained
from mergelab.explain.changes import found_by_chance


def drawn(seed: int, contexts: int = 24, latents: int = 300) -> np.ndarray:
    """Sparse values: a latent is active in few contexts, as those of an SAE."""
    draw = np.random.default_rng(seed)
    return draw.exponential(1.0, (contexts, latents)) * (draw.random((contexts, latents)) < 0.2)


def test_planted_gains_and_losses_are_found_by_number() -> None:
    base = drawn(0)
    noise = 0.1 * np.random.default_rng(1).standard_normal(base.shape)
    other = base + noise
    other[:, [7, 90]] += np.array([1.0, 0.5])
    other[:, 30] -= 0.6
    found = find_changes(base, other)
    assert sorted(found.raised.tolist()) == [7, 90]
    assert found.raised[0] == 7 and found.lowered.tolist() == [30]
    assert found.p[7] == pytest.approx(1 / 1000) and found.p[8] > 0.2
    assert found_by_chance(base, other) < 0.3


def test_among_equals_one_search_in_twenty_finds_anything() -> None:
    names = sum(
        bool(len(changes.raised) + len(changes.lowered))
        for seed in range(60)
        for changes in [find_changes(drawn(2 * seed), drawn(2 * seed + 1), draws=199, seed=seed)]
    )
    assert names <= 8  # 3 are expected; 9 and more come by chance once in 400


def test_the_share_that_is_kept_has_an_interval_that_holds_it() -> None:
    draw = np.random.default_rng(3)
    base = np.zeros((40, 2))
    own = base + 2 + 0.2 * draw.standard_normal(base.shape)
    merge = base + own * np.array([1.0, 0.3]) + 0.1 * draw.standard_normal(base.shape)
    share, low, high = retained(base, own, merge)
    np.testing.assert_allclose(share, [1.0, 0.3], atol=0.05)
    assert (low < [1.0, 0.3]).all() and (high > [1.0, 0.3]).all() and (high - low < 0.15).all()
    # By hand, on one resample of all contexts alike.
    np.testing.assert_allclose(share, merge.sum(axis=0) / own.sum(axis=0))


def test_a_fate_is_a_word_for_a_share() -> None:
    words = {
        (1.5, 1.3, 1.7, False): "amplified",
        (1.5, 1.1, 1.9, False): "survived",
        (0.8, 0.6, 1.0, True): "survived",
        (0.5, 0.4, 0.6, False): "weakened",
        (0.5, 0.4, 0.6, True): "interfered",
        (0.5, -0.1, 0.9, False): "lost",
        (0.1, 0.05, 0.2, False): "lost",
    }
    for (share, low, high, opposed), word in words.items():
        assert fate_of(share, low, high, opposed=opposed) == word
