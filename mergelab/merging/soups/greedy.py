"""Greedy soups in memory, over any evaluator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from jaxtyping import Array, PyTree

from mergelab.errors import EvaluationError
from mergelab.merging.soups.averages import Candidates, Loader, RunningAverage, loaders, uniform_soup
from mergelab.merging.soups.scores import Objective, Scores, SoupSelection, as_selection, call_evaluator
from mergelab.merging.soups.trace import Decision, Ranked, SoupTrace

__all__ = ["Evaluator", "GreedySoup", "Rule", "ScoreSoup", "greedy_search", "greedy_soup", "replay"]


Rule = Literal["paper", "code"]

ScoreSoup = Callable[[tuple[str, ...]], Scores]
"""Validation scores of the equal-weight mean of the named candidates."""


def greedy_search(
    names: Iterable[str],
    score: ScoreSoup,
    *,
    selection: str | Objective | SoupSelection,
    rule: Rule = "paper",
    min_delta: float = 0.0,
    patience: int | None = None,
    max_size: int | None = None,
) -> SoupTrace:
    """Returns the trace of a greedy soup over named candidates; knows nothing of what a model is.

    Candidates are scored alone and sorted, best first (equal worth: by name). The best one starts the soup;
    each next one is scored in it and stays if the soup's worth is

        rule "paper":  worth(soup with it) >= worth(soup) + min_delta
        rule "code":   worth(soup with it) >  worth(soup) + min_delta

    so "paper" accepts ties and "code" does not. `min_delta` applies to the first number of a lexicographic
    worth. The soup is therefore never worse on validation than the best single model.

    Args:
        names: the candidates, all different.
        score: scores the soup of a tuple of candidates; called with one name each, then with trial soups
            `(*members, candidate)`.
        selection: orders score sheets; a metric or its name will do.
        rule: acceptance on ties, the paper's algorithm or its released code.
        min_delta: least improvement, >= 0.
        patience: stop after this many rejections in a row; None: try every candidate.
        max_size: stop when the soup has this many members; None: no bound.

    Raises:
        EvaluationError: no candidates, a name twice, a setting out of range, or `score` raised it.

    Reference:
        Wortsman et al., Model soups (arXiv:2203.05482), recipe 1 and github.com/mlfoundations/model-soups.
    """
    names, selection = list(names), as_selection(selection)
    _check(names, rule, min_delta, patience, max_size)
    ranking = [Ranked(name, score((name,))) for name in names]
    ranking.sort(key=lambda r: (tuple(-w for w in selection.worth(r.scores)), r.name))

    best = ranking[0]
    members, before, rejections = (best.name,), best.scores, 0
    decisions = []
    for candidate in ranking[1:]:
        if stop := _stop(len(members), rejections, patience, max_size):
            decisions.append(Decision(candidate.name, before, None, False, stop))
            continue
        trial = (*members, candidate.name)
        after = score(trial)
        accepted, reason = _judge(selection, rule, min_delta, before, after, best.scores)
        decisions.append(Decision(candidate.name, before, after, accepted, reason))
        if accepted:
            members, before, rejections = trial, after, 0
        else:
            rejections += 1
    settings = {
        "selection": str(selection),
        "rule": rule,
        "min_delta": min_delta,
        "patience": patience,
        "max_size": max_size,
    }
    return SoupTrace(settings, tuple(ranking), tuple(decisions))


def _stop(size: int, rejections: int, patience: int | None, max_size: int | None) -> str | None:
    if max_size is not None and size >= max_size:
        return f"not tried: the soup has its {max_size} members (max_size)"
    if patience is not None and rejections >= patience:
        return f"not tried: {rejections} rejections in a row (patience)"
    return None


def _judge(
    selection: SoupSelection, rule: Rule, min_delta: float, before: Scores, after: Scores, reference: Scores
) -> tuple[bool, str]:
    if objection := selection.objection(after, reference):
        return False, objection
    new, old = selection.worth(after), selection.worth(before)
    bar = (old[0] + min_delta, *old[1:])
    accepted = new >= bar if rule == "paper" else new > bar
    gain = ", ".join(f"{a - b:+.6g}" for a, b in zip(new, old, strict=True))
    needed = (">= " if rule == "paper" else "> ") + f"{min_delta:g}"
    return accepted, f"{selection} improves by {gain} (needs {needed})"


def _check(names: list[str], rule: str, min_delta: float, patience: int | None, max_size: int | None) -> None:
    if not names:
        raise EvaluationError("A greedy soup needs at least one candidate; none was given.")
    if twice := [name for name in names if names.count(name) > 1]:
        raise EvaluationError(f"Candidate {twice[0]!r} is given twice; candidates need different names.")
    if rule not in get_args(Rule):
        raise EvaluationError(f"rule is {rule!r}; expected 'paper' (accept ties) or 'code' (improve).")
    if not min_delta >= 0:
        raise EvaluationError(f"min_delta is {min_delta}; expected 0 or more.")
    for field, value in (("patience", patience), ("max_size", max_size)):
        if value is not None and value < 1:
            raise EvaluationError(f"{field} is {value}; expected at least 1, or none for no bound.")


Evaluator = Callable[[PyTree[Array]], float | Mapping[str, float]]
"""Scores one parameter tree: a number, or numbers by metric name."""


@dataclass(frozen=True)
class GreedySoup:
    """A greedy soup's parameters, and the trace of how it came about."""

    params: PyTree[Array]
    trace: SoupTrace


def greedy_soup(
    candidates: Candidates,
    evaluate: Evaluator,
    *,
    selection: str | Objective | SoupSelection = "score",
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
        selection: a metric's name (larger is better), a `Objective`, or a rule over several metrics. A bare
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


def replay(trace: SoupTrace, candidates: Candidates) -> PyTree[Array]:
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
