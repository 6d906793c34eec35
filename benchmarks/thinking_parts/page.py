"""The page of the experiment: tables of means over seeds, and sentences that the figures decide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["page"]


def page(results: dict[str, Any]) -> str:
    """The page as Markdown; parts that have not been measured are said to be missing."""
    parts = ["# Compute at test time", "", "Written by `python -m benchmarks.test_time --publish`.", ""]
    parts += _throughput(results.get("throughput"))
    runs = [results["arithmetic"][seed] for seed in sorted(results.get("arithmetic", {}), key=int)]
    parts += _arithmetic(runs, results.get("size", {}))
    parts += _language_model(results.get("language_model"))
    return "\n".join(parts).rstrip() + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines] + [""]


def _mean(values: Sequence[float]) -> str:
    """A mean over seeds, and how far they lie apart."""
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def _throughput(found: dict[str, Any] | None) -> list[str]:
    lines = ["## Samples together and one call each", ""]
    if found is None:
        return [*lines, "Not measured yet.", ""]
    seconds, samples = found["seconds"], found["samples"]
    ratio = seconds["together"] / seconds["one call each"]
    rows = [[name, f"{value:.2f}"] for name, value in seconds.items()]
    said = (
        f"{samples} samples of {found['new_tokens']} tokens behind {found['prompt_tokens']}: together they "
    )
    said += f"take {ratio:.2f} of the time of one call each"
    if "transformers" in seconds:
        said += f", and {seconds['together'] / seconds['transformers']:.2f} of that of `num_return_sequences`"
    said += (
        ". The programs take turns in one process: where the machine is busy ratios stand, seconds do not."
    )
    return [*lines, *_table([f"{samples} samples", "seconds"], rows), said, ""]


def _arithmetic(runs: list[dict[str, Any]], size: dict[str, Any]) -> list[str]:
    lines = ["## Sums with scratchpads", ""]
    if not runs:
        return [*lines, "Not measured yet.", ""]
    lines += [
        f"A transformer of two layers, trained here ({size.get('steps')} steps) on sums of 3 to 7 digits "
        f"with scratchpads, solves {size.get('tasks')} sums of 5 to 7. Means over {len(runs)} seeds ± their "
        "standard deviation; tokens are those generated or read for a task, and FLOPs those that the lowered "
        "programs state. The probe is fitted to traces of as many other sums, and reads the stream behind "
        "the last block.",
        "",
        "### One trace, cut off at a budget",
        "",
    ]
    rows = [
        [
            str(point["budget"]),
            _mean([run["plain"][place]["accuracy"] for run in runs]),
            f"{np.mean([run['plain'][place]['tokens'] for run in runs]):.1f}",
        ]
        for place, point in enumerate(runs[0]["plain"])
    ]
    lines += [*_table(["budget", "accuracy", "tokens"], rows), _stops_helping(runs), ""]
    lines += ["### Votes and verifiers on the same traces: equal compute", ""]
    judges = list(runs[0]["verified"])
    header = ["traces", "tokens", "MFLOPs", "vote", *(f"{judge}, best" for judge in judges)]
    rows = []
    for place, point in enumerate(runs[0]["voted"]):
        judged = [
            _mean([run["verified"][judge]["best-of-n"][place]["accuracy"] for run in runs])
            for judge in judges
        ]
        tokens = np.mean([run["voted"][place]["tokens"] for run in runs])
        flops = np.mean([run["voted"][place]["flops"] for run in runs])
        voted = _mean([run["voted"][place]["accuracy"] for run in runs])
        rows.append([str(point["samples"]), f"{tokens:.0f}", f"{flops / 1e6:.1f}", voted, *judged])
    lines += _table(header, rows)
    rows = [
        [
            judge,
            _mean([run["verified"][judge]["weighted-vote"][-1]["accuracy"] for run in runs]),
            _mean(
                [run["auroc"][judge] for run in runs if run["auroc"].get(judge) is not None] or [float("nan")]
            ),
        ]
        for judge in judges
    ]
    lines += [*_table(["verifier", "weighted vote of all", "AUROC"], rows), _judges(runs), ""]
    lines += ["### Searches", ""]
    lines += [
        f"On the first {size.get('searched')} of these tasks, the vote among them; deepconf, which is no "
        "search, on all. Tokens are all that were generated, those of dropped states among them.",
        "",
    ]
    rows = [
        [
            name,
            str(point["samples"]),
            _mean([run["searched"][name][place]["accuracy"] for run in runs]),
            f"{np.mean([run['searched'][name][place]['tokens'] for run in runs]):.0f}",
        ]
        for name, points in runs[0]["searched"].items()
        for place, point in enumerate(points)
    ]
    lines += [*_table(["search", "side by side", "accuracy", "tokens"], rows), _searches(runs), ""]
    lines += ["### Forced to think longer", ""]
    rows = [
        [
            str(point["least"]),
            _mean([run["forced"][place]["accuracy"] for run in runs]),
            f"{np.mean([run['forced'][place]['tokens'] for run in runs]):.1f}",
        ]
        for place, point in enumerate(runs[0]["forced"])
    ]
    return [*lines, *_table(["tokens at least", "accuracy", "tokens"], rows), _hurts(runs), ""]


def _stops_helping(runs: list[dict[str, Any]]) -> str:
    points = runs[0]["plain"]
    means = [
        float(np.mean([run["plain"][place]["accuracy"] for run in runs])) for place in range(len(points))
    ]
    enough = next(place for place, mean in enumerate(means) if mean >= max(means) - 0.005)
    if enough == len(points) - 1:
        return (
            f"More still helps at the largest budget, {points[-1]['budget']} tokens, but the last 8 add "
            f"{means[-1] - means[-2]:.3f} where 8 before added up to {max(np.diff(means)):.3f}."
        )
    return (
        f"From a budget of {points[enough]['budget']} tokens on, a larger one adds no more than 0.005 to the "
        f"accuracy of one trace ({means[enough]:.3f})."
    )


def _judges(runs: list[dict[str, Any]]) -> str:
    """What the verifiers come to with all traces."""
    judges, count = list(runs[0]["verified"]), runs[0]["voted"][-1]["samples"]
    vote = np.mean([run["voted"][-1]["accuracy"] for run in runs])
    best = {
        judge: float(np.mean([run["verified"][judge]["best-of-n"][-1]["accuracy"] for run in runs]))
        for judge in judges
    }
    right = {
        judge: float(np.mean([run["auroc"][judge] for run in runs if run["auroc"].get(judge) is not None]))
        for judge in judges
    }
    top = max(best, key=best.__getitem__)
    said = f"Of {count} traces the best by {top} is right in {best[top]:.3f} of the tasks, "
    said += f"the vote in {vote:.3f}."
    blind = [judge for judge in judges if abs(right[judge] - 0.5) < 0.05]
    if blind:
        least, most = min(best[one] for one in blind), max(best[one] for one in blind)
        said += (
            f" What tells right from wrong no better than chance ({', '.join(blind)}: AUROC within 0.05 of "
            f"0.5) picks what is unusual: the best by it is right in {least:.3f} to {most:.3f} of the tasks, "
            f"a single trace in {_first(runs):.3f}."
        )
    return said


def _first(runs: list[dict[str, Any]]) -> float:
    """Accuracy of the first trace."""
    return float(np.mean([run["voted"][0]["accuracy"] for run in runs]))


def _searches(runs: list[dict[str, Any]]) -> str:
    """The best search beside the vote of as many traces."""
    last = {
        name: float(np.mean([run["searched"][name][-1]["accuracy"] for run in runs]))
        for name in runs[0]["searched"]
        if name != "deepconf"
    }
    vote = last.pop("vote")
    top = max(last, key=last.__getitem__)
    worst = min(last, key=last.__getitem__)
    return (
        f"The best is {top} ({last[top]:.3f}), where the vote comes to {vote:.3f}; {worst} comes to "
        f"{last[worst]:.3f}: a search is worth what guides it."
    )


def _hurts(runs: list[dict[str, Any]]) -> str:
    points = runs[0]["forced"]
    means = [
        float(np.mean([run["forced"][place]["accuracy"] for run in runs])) for place in range(len(points))
    ]
    best = int(np.argmax(means))
    said = f"Best is a least of {points[best]['least']} tokens ({means[best]:.3f}); "
    if means[-1] < means[best] - 0.005:
        return said + f"forced to {points[-1]['least']}, accuracy is {means[best] - means[-1]:.3f} lower."
    return said + f"up to {points[-1]['least']} tokens, more thinking does not lower it by more than 0.005."


def _language_model(found: dict[str, Any] | None) -> list[str]:
    lines = ["## A language model", ""]
    if found is None:
        return [*lines, "Not measured yet.", ""]
    rows = [
        [
            name,
            f"{one['accuracy']['value']:.3f}",
            "{:.3f} - {:.3f}".format(*one["accuracy"]["interval"]),
            f"{one['answered']:.2f}",
            f"{one['tokens']:.0f}",
            f"{one['flops'] / 1e9:.1f}",
        ]
        for name, one in found["methods"].items()
    ]
    lines += [
        f"{found['model']}, {found['questions']} sums of two numbers below 50, {found['samples']} traces of "
        f"at most {found['budget']} tokens, temperature 0.7.",
        "",
    ]
    header = ["method", "accuracy", "95 % interval", "answered", "tokens a task", "GFLOPs a task"]
    bounds = np.array([one["accuracy"]["interval"] for one in found["methods"].values()])
    apart = bounds[:, 0].max() > bounds[:, 1].min()
    said = (
        "so few tasks tell no method from another, and show that each runs" if not apart else "some are apart"
    )
    return [
        *lines,
        *_table(header, rows),
        f"The intervals {'do not all ' if apart else ''}overlap: {said}.",
        "",
    ]
