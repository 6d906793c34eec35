"""Votes and weights on texts whose winner is known."""

from __future__ import annotations

import numpy as np
import pytest

from mergelab.decoding import (
    best_of_n,
    boxed_answer,
    last_number,
    lowest_group_confidence,
    self_consistency,
    step_score,
    tail_confidence,
    weighted_vote,
)
from mergelab.errors import DecodingError


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("17 * 23 = 391", "391"),
        ("it is 1,000,000.", "1000000"),
        ("-0.50 left", "-0.5"),
        ("007", "7"),
        ("-0", "0"),
        ("2.0", "2"),
        ("", None),
    ],
)
def test_numbers_are_found_in_one_form(text: str, number: str | None) -> None:
    assert last_number(text) == number


def test_boxes_are_read_to_their_own_brace() -> None:
    assert boxed_answer(r"\boxed{1} then \boxed{ \frac{1}{2} } end") == r"\frac{1}{2}"
    assert boxed_answer(r"\boxed{1") is None and boxed_answer("1") is None


def test_the_answer_of_most_texts_wins_and_weights_may_turn_it() -> None:
    texts = ["so 4", "it is 5", "4.0", "no idea", "5", "4"]
    found = self_consistency(texts)
    assert (found.answer, dict(found.counts), found.used) == ("4", {"4": 3, "5": 2}, 6)
    assert self_consistency(["a", "b"]).answer is None
    assert self_consistency(["x1", "y2"], lambda text: text[0]).answer == "x"
    answers = [last_number(text) for text in texts]
    assert weighted_vote(answers, [0.1, 0.9, 0.1, 5.0, 0.9, 0.1]).answer == "5"
    assert best_of_n(["a", "bbb", "ccc"], len) == ("bbb", [1.0, 3.0, 3.0])


def test_scores_of_steps() -> None:
    steps = [0.9, 0.5, 0.8]
    assert [step_score(steps, how) for how in ("min", "product", "last")] == pytest.approx([0.5, 0.36, 0.8])


def test_confidences_of_groups_and_tails() -> None:
    values = np.random.default_rng(0).gamma(2.0, 2.0, 40)
    means = [values[n : n + 7].mean() for n in range(34)]
    assert lowest_group_confidence(values, 7) == pytest.approx(min(means))
    assert lowest_group_confidence(values, 100) == pytest.approx(values.mean())
    assert tail_confidence(values, 7) == pytest.approx(means[-1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: self_consistency([]), "at least one"),
        (lambda: weighted_vote(["a"], [1, 2]), "1 of them"),
        (lambda: weighted_vote(["a"], [-1]), "at least 0"),
        (lambda: step_score([0.5], "mean"), "min, product or last"),  # type: ignore[arg-type]
        (lambda: step_score([1.5]), "probabilities"),
        (lambda: best_of_n([], len), "at least one"),
        (lambda: best_of_n(["a"], lambda _: float("nan")), "not NaN"),
        (lambda: tail_confidence([], 1), "at least one token"),
        (lambda: lowest_group_confidence([1.0], 0), "at least 1 token"),
    ],
    ids=range(9),
)
def test_votes_that_mean_nothing_are_refused(call: object, message: str) -> None:
    with pytest.raises(DecodingError, match=message):
        call()  # type: ignore[operator]
