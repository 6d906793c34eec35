"""Greedy soup of parameter trees in memory, over any evaluator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, PyTree

from mergelab.merging.soups.averages import RunningAverage
from mergelab.merging.soups.candidates import Candidates, Loader, loaders
from mergelab.merging.soups.scores import Scores, call_evaluator
from mergelab.merging.soups.search import Rule, greedy_search
from mergelab.merging.soups.selection import Metric, Selection, as_selection
from mergelab.merging.soups.trace import Trace
from mergelab.merging.soups.uniform import uniform_soup

__all__ = ["Evaluator", "GreedySoup", "greedy_soup", "replay"]

Evaluator = Callable[[PyTree[Array]], float | Mapping[str, float]]
"""Scores one parameter tree: a number, or numbers by metric name."""


@dataclass(frozen=True)
class GreedySoup:
    """A greedy soup's parameters, and the trace of how it came about."""

    params: PyTree[Array]
    trace: Trace


def greedy_soup(
    candidates: Candidates,
    evaluate: Evaluator,
    *,
    selection: str | Metric | Selection = "score",
    rule: Rule = "paper",
    min_delta: float = 0.0,
    patience: int | None = None,
    max_size: int | None = None,
    test_evaluate: Evaluator | None = None,
    test_ensemble: Callable[[Iterator[PyTree[Array]]], float | Mapping[str, float]] | None = None,
) -> GreedySoup:
    """Averages the candidates that help on validation; see `search.greedy_search` for the algorithm.

        soup = greedy_soup({"lr1": a, "lr2": b}, validation_accuracy, test_evaluate=test_accuracy)
        soup.params, soup.trace.members, soup.trace.test["soup"]

    At most one candidate and two float32 averages are in memory when candidates are loaders or paths.

    Args:
        candidates: parameter trees, loaders or checkpoint paths, by name or in order.
        evaluate: scores a tree on *validation* data.
        selection: a metric's name (larger is better), a `Metric`, or a rule over several metrics. A bare
            number from the evaluator stands for the one metric.
        rule: whether a tie is accepted ("paper") or not ("code").
        min_delta: least improvement in the first metric, >= 0.
        patience: stop after this many rejections in a row; None: try every candidate.
        max_size: stop when the soup has this many members; None: no bound.
        test_evaluate: scores a tree on *test* data; called after the search has ended, on the soup, the best
            single model by validation, and the uniform soup of all candidates.
        test_ensemble: scores the ensemble of the trees it is given (all candidates, best first), on test
            data; for comparison, since an ensemble costs as many forward passes as it has members.

    Returns:
        The soup, in the dtypes of its first member, and its trace.

    Raises:
        EvaluationError: an evaluator failed or returned a missing or non-finite metric (the message names
            candidate and metric), or a setting is out of range.
        OperatorError: candidates differ in structure or shape.
    """
    load = loaders(candidates)
    chosen = as_selection(selection)
    metrics = [metric.name for metric in chosen.metrics]
    pot = _Pot(load)

    def score(members: tuple[str, ...]) -> Scores:
        return call_evaluator(evaluate, pot.mean(members), who=describe(members), metrics=metrics)

    trace = greedy_search(
        load, score, selection=chosen, rule=rule, min_delta=min_delta, patience=patience, max_size=max_size
    )
    params = replay(trace, candidates)

    def test(tree: Any, who: str, call: Callable[[Any], Any]) -> dict[str, float]:
        return call_evaluator(call, tree, who=f"{who} on test", metrics=metrics, required=False)

    tests: dict[str, Scores] = {}
    if test_evaluate is not None:
        tests["soup"] = test(params, "the soup", test_evaluate)
        best = trace.ranking[0].name
        tests["best_single"] = test(load[best](), f"candidate {best!r}", test_evaluate)
        tests["uniform"] = test(uniform_soup(load.values()), "the uniform soup", test_evaluate)
    if test_ensemble is not None:
        ranked = (load[r.name]() for r in trace.ranking)
        tests["ensemble"] = test(ranked, "the ensemble", test_ensemble)
    return GreedySoup(params, trace.with_test(tests))


def replay(trace: Trace, candidates: Candidates) -> PyTree[Array]:
    """Returns the soup a trace describes, rebuilt from the candidates without any evaluation."""
    load = loaders(candidates)
    return uniform_soup(load[name] for name in trace.members)


def describe(members: tuple[str, ...]) -> str:
    """Returns words for a soup of these candidates, for messages."""
    if len(members) == 1:
        return f"candidate {members[0]!r}"
    return f"candidate {members[-1]!r} added to the soup of {', '.join(map(repr, members[:-1]))}"


class _Pot:
    """Means of growing sets of candidates: a trial extends the mean it was offered to, one tree at a time."""

    def __init__(self, load: Mapping[str, Loader]) -> None:
        self._load = load
        self._kept: dict[tuple[str, ...], RunningAverage] = {}

    def mean(self, members: tuple[str, ...]) -> PyTree[Array]:
        *others, last = members
        if not others:
            return self._load[last]()
        soup = self._soup(tuple(others))
        trial = soup.add(self._load[last]())
        # The next trial extends either this one (accepted) or the soup it extended (rejected).
        self._kept = {tuple(others): soup, members: trial}
        return trial.result()

    def _soup(self, members: tuple[str, ...]) -> RunningAverage:
        if members not in self._kept:
            average = RunningAverage.of(self._load[members[0]]())
            for name in members[1:]:
                average = average.add(self._load[name]())
            return average
        return self._kept[members]
