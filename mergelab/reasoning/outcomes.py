"""What a run came to: accuracy with its interval, pass@k, tokens, operations and dollars, out of its log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mergelab.decoding.accuracy import accuracy_interval, pass_at_k
from mergelab.decoding.cost import Prices, Usage
from mergelab.decoding.votes import best_of_n, weighted_vote
from mergelab.reasoning.methods import decide, draws_independently

__all__ = ["Logged", "results_of"]

Logged = Mapping[int, tuple[Sequence[Mapping[str, Any]], Mapping[str, Any]]]
"""For each task its traces and its outcome, as `TraceLog.tasks` holds them."""


def results_of(logged: Logged, method: str, prices: Prices | None = None) -> dict[str, Any]:
    """The figures of a run, as plain data; they depend on its log alone.

    Args:
        logged: traces and outcomes by task, at least one.
        method: name of the method.
        prices: dollars per million tokens; no cost is told without them.
    """
    tasks = [logged[number] for number in sorted(logged)]
    outcomes = [outcome for _, outcome in tasks]
    counts = [len(traces) for traces, _ in tasks]
    prompt, generated = (sum(one[name] for one in outcomes) for name in ("prompt_tokens", "generated"))
    answered = sum(trace["answer"] is not None for traces, _ in tasks for trace in traces)
    found: dict[str, Any] = {
        "tasks": len(tasks),
        "traces": sum(counts),
        "accuracy": _share([bool(one["correct"]) for one in outcomes]),
        "answered": answered / max(sum(counts), 1),
        "any_correct": _share([any(trace["correct"] for trace in traces) for traces, _ in tasks]),
    }
    if draws_independently(method):
        found["pass_at_k"] = {str(k): _mean_pass(tasks, k) for k in _sizes(min(counts))}
    found |= {
        "tokens": {"prompt": prompt, "generated": generated, "per_task": (prompt + generated) / len(tasks)},
        "flops": {"total": float(sum(map(_flops, outcomes)))},
        "cost": None,
    }
    found["flops"]["per_task"] = found["flops"]["total"] / len(tasks)
    if prices is not None:
        dollars = sum(prices.of(Usage(one["prompt_tokens"], 0, one["generated"])) for one in outcomes)
        found["cost"] = {"dollars": dollars, "prompt": prices.prompt, "completion": prices.completion}
        right = sum(bool(one["correct"]) for one in outcomes)
        found["cost"]["per_correct_answer"] = dollars / right if right else None
    found["curve"] = _curve(tasks, method, min(counts))
    found["verifiers"] = _verifiers(tasks)
    return found


def _share(right: Sequence[bool]) -> dict[str, Any]:
    count = sum(right)
    return {
        "value": count / len(right),
        "interval": list(accuracy_interval(count, len(right))),
        "correct": count,
    }


def _flops(outcome: Mapping[str, Any], generated: int | None = None) -> float:
    """Operations of a task: of its prompt, which is read once, and of the tokens behind it."""
    count = outcome["generated"] if generated is None else generated
    return float(outcome["flops"]["prompt"] + count * outcome["flops"]["token"])


def _sizes(most: int) -> list[int]:
    """Powers of two up to a number, and that number."""
    return sorted({*(2**n for n in range(most.bit_length()) if 2**n <= most), most})


def _mean_pass(tasks: Sequence[tuple[Sequence[Mapping[str, Any]], Any]], k: int) -> float:
    rates = [pass_at_k(len(traces), sum(bool(t["correct"]) for t in traces), k) for traces, _ in tasks]
    return float(np.mean(rates))


def _curve(
    tasks: Sequence[tuple[Sequence[Mapping[str, Any]], Mapping[str, Any]]], method: str, most: int
) -> list[dict[str, Any]]:
    """Accuracy against compute: with the first 1, 2, 4, ... traces of each task, where they are draws."""
    points = []
    for k in _sizes(most) if draws_independently(method) else [most]:
        right, tokens, flops = [], 0, 0.0
        for traces, outcome in tasks:
            if k == len(traces):
                right.append(bool(outcome["correct"]))
                generated = outcome["generated"]
            else:
                some = traces[:k]
                chosen = decide(method, [t["answer"] for t in some], [t["worth"] for t in some])
                right.append(chosen is not None and chosen == outcome["reference"])
                generated = sum(trace["tokens"] for trace in some)
            tokens += outcome["prompt_tokens"] + generated
            flops += _flops(outcome, generated)
        point = {"samples": k, "tokens_per_task": tokens / len(tasks), "flops_per_task": flops / len(tasks)}
        point |= {"accuracy": _share(right)}
        if draws_independently(method):
            point["pass_at_k"] = _mean_pass(tasks, k)
        points.append(point)
    return points


def _verifiers(tasks: Sequence[tuple[Sequence[Mapping[str, Any]], Mapping[str, Any]]]) -> dict[str, Any]:
    """How well each reading tells right traces from wrong ones, on the same traces: at equal compute."""
    names = list(dict.fromkeys(name for traces, _ in tasks for trace in traces for name in trace["scores"]))
    found = {}
    for name in names:
        best, voted = [], []
        scores, right = [], []
        for traces, outcome in tasks:
            own = [float(trace["scores"].get(name, 0.0)) for trace in traces]
            answers = [trace["answer"] for trace in traces]
            chosen = answers[best_of_n(range(len(own)), lambda n, own=own: own[n])[0]]
            winner = weighted_vote(answers, np.maximum(own, 0.0)).answer
            best.append(chosen is not None and chosen == outcome["reference"])
            voted.append(winner is not None and winner == outcome["reference"])
            scores += own
            right += [bool(trace["correct"]) for trace in traces]
        found[name] = {
            "best_of_n": _share(best),
            "weighted_vote": _share(voted),
            "auroc": _auroc(np.array(scores), np.array(right)),
        }
    return found


def _auroc(scores: np.ndarray, right: np.ndarray) -> float | None:
    """Probability that a right trace scores above a wrong one, ties half; None where all are alike."""
    from scipy.stats import rankdata

    positive, negative = int(right.sum()), int((~right).sum())
    if not positive or not negative:
        return None
    ranks = rankdata(scores)
    return float((ranks[right].sum() - positive * (positive + 1) / 2) / (positive * negative))
