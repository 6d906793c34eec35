"""Greedy soups: the acceptance rules, the limits, the separation of validation and test, and the trace."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergelab.errors import EvaluationError, OperatorError, OutputError
from mergelab.merging.soups import (
    Guarded,
    Lexicographic,
    Objective,
    SoupTrace,
    WeightedScores,
    greedy_soup,
    replay,
)
from mergelab.merging.soups.greedy import greedy_search
from mergelab.merging.soups.scores import as_selection


def scalar(**values: float) -> dict[str, dict[str, np.ndarray]]:
    """Candidates of one parameter each, so that a soup's score can be worked out by hand."""
    return {name: {"x": np.float32(value)} for name, value in values.items()}


def closeness(tree: Any) -> float:
    return -abs(float(tree["x"]))


@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=8), st.sampled_from(["paper", "code"]))
def test_never_worse_than_the_best_single_and_the_trace_replays(values: list[float], rule: str) -> None:
    candidates = scalar(**{f"m{i}": v for i, v in enumerate(values)})
    soup = greedy_soup(candidates, closeness, rule=rule)
    best = max(closeness(t) for t in candidates.values())
    assert soup.trace.validation["score"] >= best
    assert closeness(soup.params) == soup.trace.validation["score"]
    again = SoupTrace.from_json(json.dumps(soup.trace.to_json()))
    assert again == soup.trace
    np.testing.assert_array_equal(replay(again, candidates)["x"], soup.params["x"])


def test_candidates_are_tried_best_first_and_equals_by_name() -> None:
    soup = greedy_soup(scalar(d=3, c=-1, b=1, a=2), closeness)
    assert [r.name for r in soup.trace.ranking] == ["b", "c", "a", "d"]
    assert soup.trace.members == ("b", "c")
    assert [d.accepted for d in soup.trace.decisions] == [True, False, False]
    np.testing.assert_allclose(soup.params["x"], 0)


def test_only_the_paper_accepts_a_tie() -> None:
    candidates = scalar(a=1, b=1, c=1)
    assert greedy_soup(candidates, closeness, rule="paper").trace.members == ("a", "b", "c")
    assert greedy_soup(candidates, closeness, rule="code").trace.members == ("a",)


def test_min_delta_asks_for_a_real_improvement() -> None:
    candidates = scalar(a=1.0, b=-1.5, c=0.5)  # ranked c, a, b; c+a is worse, c+b is exactly equal
    assert greedy_soup(candidates, closeness).trace.members == ("c", "b")
    assert greedy_soup(candidates, closeness, min_delta=0.1).trace.members == ("c",)
    better = scalar(a=1.0, b=-1.0)
    assert greedy_soup(better, closeness, min_delta=1.0, rule="paper").trace.members == ("a", "b")
    assert greedy_soup(better, closeness, min_delta=1.0, rule="code").trace.members == ("a",)


def test_patience_and_max_size_stop_the_search_without_further_evaluation() -> None:
    calls: list[float] = []

    def evaluate(tree: Any) -> float:
        calls.append(float(tree["x"]))
        return closeness(tree)

    candidates = scalar(a=1, b=2, c=3, d=-4)
    patient = greedy_soup(candidates, evaluate, patience=1)
    assert len(calls) == 4 + 1, "four alone, one trial"
    assert [d.after is None for d in patient.trace.decisions] == [False, True, True]
    assert "patience" in patient.trace.decisions[-1].reason
    small = greedy_soup(scalar(a=1, b=-1, c=1, d=-1), closeness, max_size=2)
    assert len(small.trace.members) == 2
    assert "max_size" in small.trace.decisions[-1].reason


def sheet(**table: Mapping[str, float]) -> Callable[[tuple[str, ...]], Mapping[str, float]]:
    """Scores of members looked up by their joined names."""
    return lambda members: table["_".join(members)]


def members(score: Callable[[tuple[str, ...]], Mapping[str, float]], selection: Any) -> tuple[str, ...]:
    return greedy_search(["a", "b"], score, selection=selection).members


def test_lexicographic_breaks_ties_with_the_second_metric() -> None:
    rule = Lexicographic((Objective("acc"), Objective("loss", "min")))
    before = {"a": {"acc": 0.9, "loss": 1.0}, "b": {"acc": 0.8, "loss": 0.1}}
    assert members(sheet(**before, a_b={"acc": 0.9, "loss": 0.9}), rule) == ("a", "b")
    assert members(sheet(**before, a_b={"acc": 0.9, "loss": 1.1}), rule) == ("a",)
    assert members(sheet(**before, a_b={"acc": 0.91, "loss": 9.0}), rule) == ("a", "b")


def test_a_weighted_sum_trades_metrics_with_their_directions() -> None:
    rule = WeightedScores(((Objective("acc"), 1.0), (Objective("loss", "min"), 0.5)))
    before = {"a": {"acc": 0.9, "loss": 1.0}, "b": {"acc": 0.3, "loss": 1.0}}
    assert members(sheet(**before, a_b={"acc": 0.8, "loss": 0.7}), rule) == ("a", "b")
    assert members(sheet(**before, a_b={"acc": 0.8, "loss": 0.9}), rule) == ("a",)


ACC = Objective("acc")
RULES: list[Any] = [
    "acc", ACC, Lexicographic(("acc",)), Lexicographic((ACC,)), Lexicographic(["acc"]), Lexicographic("acc"),
    WeightedScores((("acc", 1.0),)), WeightedScores(((ACC, 1.0),)), WeightedScores([["acc", 1]]),
    Guarded("acc", ()), Guarded(ACC, (("other", 9.0),)), Guarded(Lexicographic((ACC, "other")), ((ACC, 9),)),
    Guarded(WeightedScores(((ACC, 1.0),)), [["other", 9.0]]), Guarded(Guarded(ACC, ()), ()),
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("guarded", [False, True])
def test_a_rule_takes_metrics_names_and_rules_alike(rule: Any, guarded: bool) -> None:
    rule = Guarded(rule, (("other", 0.05),)) if guarded else rule
    before = {"a": {"acc": 0.9, "other": 0.5}, "b": {"acc": 0.8, "other": 0.5}}
    assert ACC in as_selection(rule).metrics
    assert members(sheet(**before, a_b={"acc": 0.91, "other": 0.5}), rule) == ("a", "b")
    assert members(sheet(**before, a_b={"acc": 0.89, "other": 0.5}), rule) == ("a",)
    worse = members(sheet(**before, a_b={"acc": 0.91, "other": 0.4}), rule)
    assert worse == (("a",) if guarded else ("a", "b"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: as_selection(3), "3 is not a selection rule"),  # type: ignore[arg-type]
        (lambda: Guarded(None, ()), "None is not a selection rule"),  # type: ignore[arg-type]
        (lambda: Lexicographic((1,)), "1 where a metric"),  # type: ignore[arg-type]
        (lambda: WeightedScores((ACC,)), r"where \(metric, weight\) was expected"),  # type: ignore[arg-type]
        (lambda: Guarded(ACC, (("other", "a"),)), r"where \(metric, limit\) was expected"),  # type: ignore[arg-type]
        (lambda: Guarded(ACC, (("other", float("nan")),)), "is nan; expected 0 or more"),
    ],
)
def test_what_is_no_rule_is_refused_when_it_is_made(make: Callable[[], object], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        make()


def test_a_guard_measures_from_the_best_single_model_so_losses_cannot_add_up() -> None:
    rule = Guarded(as_selection("acc"), ((Objective("other"), 0.05),))
    scores = sheet(
        a={"acc": 0.9, "other": 0.5},
        b={"acc": 0.8, "other": 0.5},
        c={"acc": 0.7, "other": 0.5},
        a_b={"acc": 0.91, "other": 0.46},
        a_b_c={"acc": 0.95, "other": 0.42},
    )
    trace = greedy_search(["a", "b", "c"], scores, selection=rule)
    assert trace.members == ("a", "b"), ".42 is within .05 of .46, but not of .5"
    assert "other 0.42 is 0.08 worse" in trace.decisions[-1].reason
    assert greedy_search(["a", "b", "c"], scores, selection=as_selection("acc")).members == ("a", "b", "c")


def test_a_metric_to_minimize() -> None:
    soup = greedy_soup(
        scalar(a=1, b=-2, c=5), lambda t: abs(float(t["x"])), selection=Objective("loss", "min")
    )
    assert soup.trace.ranking[0].name == "a"
    assert soup.trace.members == ("a", "b"), "(1 - 2) / 2 is better than 1, and 4/3 is worse again"
    assert soup.trace.validation == {"loss": 0.5}


def test_the_test_evaluator_is_called_only_after_the_search() -> None:
    log: list[str] = []

    def evaluate(tree: Any) -> float:
        log.append("validation")
        return closeness(tree)

    def test_evaluate(tree: Any) -> dict[str, float]:
        log.append("test")
        return {"score": float(tree["x"])}

    candidates = scalar(a=1, b=-2, c=9)
    soup = greedy_soup(
        candidates,
        evaluate,
        test_evaluate=test_evaluate,
        test_ensemble=lambda trees: {"sum": sum(float(t["x"]) for t in trees)},
    )
    assert log == ["validation"] * 5 + ["test"] * 3
    expected = {"soup": -0.5, "best_single": 1.0, "uniform": 8 / 3}
    for name, value in expected.items():
        assert soup.trace.test[name]["score"] == pytest.approx(value, abs=1e-6)
    assert soup.trace.test["ensemble"] == {"sum": 8.0}
    # A test evaluator that says the opposite of validation changes nothing.
    contrary = greedy_soup(candidates, closeness, test_evaluate=lambda t: -closeness(t))
    assert contrary.trace.members == soup.trace.members


def test_loaders_hold_one_model_at_a_time() -> None:
    alive: set[int] = set()
    most = 0

    def load(i: int) -> dict[str, np.ndarray]:
        nonlocal most
        weights = np.full(1, i, np.float32)
        alive.add(i)
        weakref.finalize(weights, alive.discard, i)
        most = max(most, len(alive))
        return {"x": weights}

    candidates = {f"m{i:02}": partial(load, i) for i in range(12)}
    soup = greedy_soup(candidates, lambda t: -abs(float(t["x"][0])))
    assert soup.trace.ranking[0].name == "m00"
    assert most <= 2, "one being loaded, and the one before it until the name is bound again"
    held = [load(i) for i in range(12)]
    assert most == len(held), "the control, which holds all, is seen"


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        (lambda t: math.nan, r"Metric 'score' of candidate 'a' is nan"),
        (lambda t: {"scores": 1.0}, r"no metric 'score' for candidate 'a' \(did you mean 'scores'\?\)"),
        (lambda t: {"score": "high"}, r"Metric 'score' of candidate 'a' is 'high'"),
        (lambda t: {"score": True}, r"Metric 'score' of candidate 'a' is True"),
        (lambda t: 1 / 0, r"candidate 'a' failed with ZeroDivisionError"),
        (lambda t: closeness(t) if t["x"] != 0 else math.inf, r"'b' added to the soup of 'a' is inf"),
    ],
)
def test_a_bad_evaluator_is_named_with_candidate_and_metric(evaluate: Any, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        greedy_soup(scalar(a=1, b=-1), evaluate)


def test_a_bare_number_cannot_stand_for_two_metrics() -> None:
    rule = Lexicographic((Objective("acc"), Objective("loss", "min")))
    with pytest.raises(EvaluationError, match="needs the metrics acc, loss"):
        greedy_soup(scalar(a=1), closeness, selection=rule)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "papers"}, "rule is 'papers'"),
        ({"min_delta": -1.0}, "min_delta is -1"),
        ({"patience": 0}, "patience is 0"),
        ({"max_size": 0}, "max_size is 0"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        greedy_soup(scalar(a=1), closeness, **options)


def test_no_candidates_wrong_directions_and_foreign_files() -> None:
    with pytest.raises(EvaluationError, match="at least one candidate"):
        greedy_soup({}, closeness)
    with pytest.raises(EvaluationError, match="'b' is given twice"):
        greedy_search(["b", "b"], lambda m: {"score": 1.0}, selection=as_selection("score"))
    with pytest.raises(EvaluationError, match="expected 'max' or 'min'"):
        Objective("acc", "up")  # pyright: ignore[reportArgumentType]
    with pytest.raises(OperatorError, match="'x' has shape"):
        greedy_soup({"a": {"x": np.ones(2, np.float32)}, "b": {"x": np.ones(3, np.float32)}}, lambda t: 1.0)
    with pytest.raises(OutputError, match="not the trace of a greedy soup"):
        SoupTrace.from_json('{"format": 99}')


def test_sequences_are_named_so_that_name_order_is_list_order() -> None:
    soup = greedy_soup([{"x": np.float32(1)}] * 11, closeness)
    assert soup.trace.members == tuple(f"model_{i:02}" for i in range(11))
