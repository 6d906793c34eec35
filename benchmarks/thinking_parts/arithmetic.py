"""Accuracy against compute for one seed: plain, voted, verified, searched and forced decoding."""

from __future__ import annotations

from typing import Any

import mergelab as ml
from benchmarks.thinking_parts.scratchpads import SITE, Size, tasks_of, tokenizer, trained
from mergelab.decoding import Thinking
from mergelab.reasoning import Writer, check_tasks, fit_reading, log_probability_reading, step_rows

__all__ = ["arithmetic"]

ANSWER = r"regex:#(\d+)"
KINDS = ("probe", "shuffled", "random")
SEARCHES = ("beam", "dvts", "particles")


def arithmetic(seed: int, size: Size) -> dict[str, Any]:
    """All figures of one seed, as plain data.

    Args:
        seed: seed of the training, of the tasks and of every draw.
        size: how large it is.
    """
    model, params, loss = trained(seed, size)
    tokens, tasks = tokenizer(), tasks_of(1000 + seed, size.tasks)
    others = [task for task in tasks_of(2000 + seed, 2 * size.tasks) if task not in tasks][: size.tasks]
    writer = Writer(model, params, tokens, size.budget, step=";")
    rows = step_rows(writer, check_tasks(others), SITE, samples=4, answer=ANSWER, seed=seed)
    readings = [fit_reading(rows, kind, seed=seed)[0] for kind in KINDS]
    judges = [readings[0], log_probability_reading(), *readings[1:]]

    def run(method: str, samples: int, verifiers: Any = (), **options: Any) -> ml.reasoning.Solved:
        given: dict[str, Any] = {"budget": size.budget, "answer": ANSWER, "step": ";", "seed": seed}
        some = tasks[: size.searched] if method in SEARCHES else tasks
        return ml.solve(
            model, params, tokens, tasks=some, method=method, samples=samples, verifiers=verifiers,
            **(given | options),
        )  # fmt: skip

    sampled = run("vote", size.samples, judges)
    found: dict[str, Any] = {
        "seed": seed,
        "loss": loss,
        "fitted_rows": len(rows.right),
        "fitted_share_right": float(rows.right.mean()),
        "plain": _by_budget(sampled, size.budget),
        "pass_at_k": sampled.results["pass_at_k"],
        "voted": _points(sampled.results),
        "verified": {
            judge.name.partition(":")[0]: {
                how: [_figures(_judged(sampled, tasks, judge.name, how, k)) for k in _sizes(size.samples)]
                for how in ("best-of-n", "weighted-vote")
            }
            for judge in judges
        },
        "auroc": {name.partition(":")[0]: one["auroc"] for name, one in sampled.results["verifiers"].items()},
        "searched": {
            "vote": [
                _voted(sampled, tasks[: size.searched], k) for k in (4, size.samples) if k <= size.samples
            ]
        },
        "forced": [],
    }
    for method in SEARCHES:
        for judge in judges[:2] + judges[3:]:  # one control is enough
            name = f"{method} by {judge.name.partition(':')[0]}"
            found["searched"][name] = [
                _points(run(method, samples, [judge]).results)[-1] | {"samples": samples}
                for samples in sorted({4, size.samples})
            ]
    found["searched"]["deepconf"] = [_points(run("deepconf", size.samples).results)[-1]]
    for least in (0, 8, 16, 32, 48):
        if least < size.budget - 8:
            thinking = Thinking("#", least, None, "W")
            point = _points(run("force", 1, thinking=thinking, budget=size.budget + 24).results)[-1]
            found["forced"].append(point | {"least": least})
    return found


def _sizes(most: int) -> list[int]:
    return [k for k in (1, 2, 4, 8, 16, 32) if k <= most]


def _points(results: Any) -> list[dict[str, float]]:
    return [
        {
            "samples": point["samples"],
            "accuracy": point["accuracy"]["value"],
            "tokens": point["tokens_per_task"],
            "flops": point["flops_per_task"],
        }
        for point in results["curve"]
    ]


def _by_budget(solved: Any, most: int) -> list[dict[str, float]]:
    """Accuracy of one trace that is cut off at a budget: it answers if it has ended by then."""
    traces = [trace for some in solved.traces for trace in some]
    return [
        {
            "budget": budget,
            "accuracy": sum(t["correct"] and t["tokens"] <= budget for t in traces) / len(traces),
            "tokens": sum(min(t["tokens"], budget) for t in traces) / len(traces),
        }
        for budget in (*range(16, most, 8), most)
    ]


def _voted(solved: Any, tasks: Any, k: int) -> dict[str, float]:
    """The vote of the first `k` traces on the first tasks, those that searches solve."""
    from mergelab.reasoning import decide

    right = tokens = 0
    for some, task in zip(solved.traces, tasks, strict=False):
        first = some[:k]
        answer = decide("vote", [t["answer"] for t in first], [1.0] * len(first))
        right += next((t["correct"] for t in first if t["answer"] == answer), False)
        tokens += len(task["prompt"]) + sum(t["tokens"] for t in first)  # a sign is a token
    count = len(tasks)
    return {"samples": k, "accuracy": right / count, "tokens": tokens / count}


def _judged(solved: Any, tasks: Any, name: str, how: str, k: int) -> list[tuple[bool, int]]:
    """For each task whether the first `k` traces, judged by a reading, come to what is right; and tokens."""
    from mergelab.reasoning import decide

    found = []
    for some, task in zip(solved.traces, tasks, strict=True):
        first = some[:k]
        answer = decide(how, [t["answer"] for t in first], [max(t["scores"][name], 0.0) for t in first])
        found.append((answer == str(task["answer"]), sum(t["tokens"] for t in first)))
    return found


def _figures(judged: list[tuple[bool, int]]) -> dict[str, float]:
    return {
        "accuracy": sum(right for right, _ in judged) / len(judged),
        "tokens": sum(tokens for _, tokens in judged) / len(judged),
    }
