"""The digits experiment in small: greedy beats the best by validation on test, and where it does not."""

from __future__ import annotations

import pytest

from benchmarks.digits_soup import SETTINGS, experiment

pytestmark = pytest.mark.slow

AUGMENTED, CLEAN, UNEQUAL = SETTINGS


@pytest.mark.parametrize("seed", [0, 1])
def test_greedy_beats_the_best_single_model_on_test(seed: int) -> None:
    outcome = experiment(AUGMENTED, seed)
    assert outcome.greedy > outcome.best_single + 1.0
    assert outcome.ensemble >= outcome.greedy
    assert outcome.members > 1


def test_on_clean_digits_there_is_nothing_to_gain() -> None:
    outcome = experiment(CLEAN, 0)
    assert abs(outcome.greedy - outcome.best_single) < 1.0
    assert outcome.best_single > 95


def test_with_unequal_budgets_only_a_selective_soup_survives() -> None:
    outcome = experiment(UNEQUAL, 0)
    assert outcome.uniform < outcome.best_single - 5.0
    assert outcome.ensemble < outcome.best_single - 5.0
    assert outcome.greedy > outcome.uniform + 5.0
