"""What a run leaves in its folder beside the log: figures as data, as a table, as a curve and as a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergelab.reasoning.outcomes import Logged
from mergelab.reasoning.tasks import Task
from mergelab.report.comparison import svg
from mergelab.report.curves import Panel, curves_figure
from mergelab.report.tables import text_table
from mergelab.report.traces import render_traces

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["solved_files", "solved_table"]


def solved_files(results: Mapping[str, Any], tasks: Sequence[Task], logged: Logged) -> dict[str, bytes]:
    """Contents of the files by name; `results.json` comes last.

    Args:
        results: the figures.
        tasks: what was asked.
        logged: traces and outcomes by task.
    """
    figure = svg(_figure(results))
    shown = [
        {
            "number": number + 1,
            "prompt": tasks[number].question,
            "traces": traces,
            **outcome,
        }
        for number, (traces, outcome) in sorted(logged.items())
    ]
    page = render_traces(
        f"{results['method']}: {results['accuracy']['correct']} of {results['tasks']} tasks solved",
        header=_HEADER,
        rows=_rows(results),
        verifiers=_verifier_rows(results),
        figure=figure,
        described=_described(results),
        tasks=shown,
    )
    return {
        "table.txt": (solved_table(results) + "\n").encode(),
        "accuracy.svg": figure.encode(),
        "traces.html": page.encode(),
        "results.json": (json.dumps(results, indent=1) + "\n").encode(),
    }


def solved_table(results: Mapping[str, Any]) -> str:
    """The figures as lines of text."""
    lines = [text_table(_HEADER, _rows(results))]
    if rows := _verifier_rows(results):
        lines += ["", text_table(_VERIFIER_HEADER, rows)]
    cost = results["cost"]
    if cost is not None:
        each = cost["per_correct_answer"]
        lines += [
            "",
            f"${cost['dollars']:.4g} in all" + ("" if each is None else f", ${each:.4g} a right answer"),
        ]
    return "\n".join(lines)


_HEADER = ("traces", "accuracy", "95 % interval", "pass@k", "tokens a task", "GFLOPs a task")
_VERIFIER_HEADER = ("verifier", "best of n", "weighted vote", "AUROC")


def _rows(results: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            str(point["samples"]),
            f"{point['accuracy']['value']:.3f}",
            "{:.3f} - {:.3f}".format(*point["accuracy"]["interval"]),
            f"{point['pass_at_k']:.3f}" if "pass_at_k" in point else "",
            f"{point['tokens_per_task']:.1f}",
            f"{point['flops_per_task'] / 1e9:.4g}",
        ]
        for point in results["curve"]
    ]


def _verifier_rows(results: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            name,
            f"{one['best_of_n']['value']:.3f}",
            f"{one['weighted_vote']['value']:.3f}",
            "" if one["auroc"] is None else f"{one['auroc']:.3f}",
        ]
        for name, one in results["verifiers"].items()
    ]


def _figure(results: Mapping[str, Any]) -> Figure:
    curve = results["curve"]
    heights = {results["method"]: [point["accuracy"]["value"] for point in curve]}
    if "pass_at_k" in results:
        heights["one of them right (pass@k)"] = [point["pass_at_k"] for point in curve]
    panels = []
    for title, name in (("Accuracy, operations", "flops_per_task"), ("Accuracy, tokens", "tokens_per_task")):
        across = [point[name] for point in curve]
        unit = "FLOPs a task" if name == "flops_per_task" else "tokens a task"
        panels.append(Panel(title, unit, {key: (across, values) for key, values in heights.items()}, True))
    return curves_figure(panels)


def _described(results: Mapping[str, Any]) -> str:
    """What the figure shows, for those who cannot see it."""
    said = [
        f"{point['accuracy']['value']:.3f} at {point['tokens_per_task']:.0f} tokens"
        for point in results["curve"]
    ]
    return f"Accuracy of {results['method']} against compute a task: {', '.join(said)}."
