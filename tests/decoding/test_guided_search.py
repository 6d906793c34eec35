"""Searches on words of two letters, of which all can be counted."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from mergelab.decoding import guided_beams, guided_trees, particle_filter, systematic_resample
from mergelab.errors import DecodingError

LIKELY = {"a": 0.7, "b": 0.3}
STEPS = 4


def worth(word: str) -> float:
    """High for words with many b, which are rarely proposed."""
    return math.prod(0.9 if letter == "b" else 0.2 for letter in word)


def scores(words: Sequence[str]) -> list[float]:
    return [worth(word) for word in words]


class Proposer:
    """Adds letters at random, and counts how often it is called."""

    def __init__(self, seed: int) -> None:
        self.rng, self.calls = np.random.default_rng(seed), 0

    def __call__(self, words: Sequence[str]) -> list[str]:
        self.calls += 1
        return [word + str(self.rng.choice(["a", "b"], p=[0.7, 0.3])) for word in words]


def both(words: Sequence[str]) -> list[str]:
    """Each of two copies of a word goes on with another letter."""
    return [word + "ab"[number % 2] for number, word in enumerate(words)]


def test_particles_are_draws_of_the_proposals_times_their_worth() -> None:
    propose = Proposer(0)
    found = particle_filter("", propose, scores, particles=20000, steps=STEPS, seed=1)
    assert found.extended == 20000 * STEPS and propose.calls == STEPS
    known = {
        "".join(word): math.prod(LIKELY[letter] for letter in word) * worth("".join(word))
        for word in itertools.product("ab", repeat=STEPS)
    }
    total, counts = sum(known.values()), Counter(found.states)
    for word, weight in known.items():
        assert counts[word] / 20000 == pytest.approx(weight / total, abs=0.02)
    assert abs(counts["bbbb"] / 20000 - 0.3**4) > 0.1  # the proposals alone are otherwise


def test_beams_and_trees_find_the_best_word_and_trees_do_not_end_each_other() -> None:
    assert guided_beams("", both, scores, width=2, branch=2, steps=STEPS).states[0] == "bbbb"
    found = guided_beams("", both, scores, width=2, branch=2, steps=9, done=lambda word: "b" in word)
    assert found.states[0] == "b" and found.scores[0] == 0.9
    trees = guided_trees("", Proposer(3), scores, trees=5, branch=2, steps=STEPS)
    assert len(trees.states) == 5 and trees.extended == 5 * 2 * STEPS
    assert list(trees.scores) == sorted(trees.scores, reverse=True) == scores(trees.states)
    early = guided_trees("", both, scores, trees=2, branch=2, steps=9, done=lambda word: "b" in word)
    assert early.states == ("b", "b") and early.extended == 4


def test_weights_are_drawn_as_often_as_expected_or_once_beside() -> None:
    weights = np.array([0.0, 3.0, 0.5, 1.5, 0.0])
    for seed in range(20):
        counts = np.bincount(systematic_resample(weights, np.random.default_rng(seed)), minlength=5)
        assert (np.abs(counts - weights) < 1).all()


def test_what_searches_refuse() -> None:
    with pytest.raises(DecodingError, match=r"particles\) was given 0"):
        particle_filter("", both, scores, particles=0, steps=1)
    with pytest.raises(DecodingError, match="not NaN"):
        guided_beams("", both, lambda words: [math.nan] * len(words), width=1, branch=2, steps=1)
    with pytest.raises(DecodingError, match="one for each of 2 states"):
        guided_trees("", both, lambda _: [1.0], trees=1, branch=2, steps=1)
    with pytest.raises(DecodingError, match="at least 0"):
        particle_filter("", both, lambda words: [-1.0] * len(words), particles=2, steps=1)
