"""The greedy search: rank candidates, then keep each one whose addition does not hurt."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, get_args

from mergelab.errors import EvaluationError
from mergelab.merging.soups.scores import Scores
from mergelab.merging.soups.selection import Metric, Selection, as_selection
from mergelab.merging.soups.trace import Decision, Ranked, Trace

__all__ = ["Rule", "ScoreSoup", "greedy_search"]

Rule = Literal["paper", "code"]

ScoreSoup = Callable[[tuple[str, ...]], Scores]
"""Validation scores of the equal-weight mean of the named candidates."""


def greedy_search(
    names: Iterable[str],
    score: ScoreSoup,
    *,
    selection: str | Metric | Selection,
    rule: Rule = "paper",
    min_delta: float = 0.0,
    patience: int | None = None,
    max_size: int | None = None,
) -> Trace:
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
    return Trace(settings, tuple(ranking), tuple(decisions))


def _stop(size: int, rejections: int, patience: int | None, max_size: int | None) -> str | None:
    if max_size is not None and size >= max_size:
        return f"not tried: the soup has its {max_size} members (max_size)"
    if patience is not None and rejections >= patience:
        return f"not tried: {rejections} rejections in a row (patience)"
    return None


def _judge(
    selection: Selection, rule: Rule, min_delta: float, before: Scores, after: Scores, reference: Scores
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
