"""The page of benchmarks/siblings.py: every operator in one table, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mergelab.verdict import Estimate, difference, resampled_sums
from mergelab.verdict.bootstrap import shown

__all__ = ["kept_gains", "page", "retained"]

Scores = Mapping[str, Mapping[str, Sequence[float]]]
"""By domain: bits and bytes of each passage."""


_TEXT = """\
Written by `python -m benchmarks.siblings --model {model} --work DIR --publish`. The base is
SmolLM2-135M-Instruct in float32. Each sibling is the base after `mergelab finetune` (all weights, AdamW,
{lr:g}) on {tokens:,} tokens of one kind of text that comes with a Python environment: sources, C headers,
licenses. Figures are bits per byte (lower is better) on {held_out} passages of 500 characters of each kind,
from files that no sibling has seen; licenses repeat one another, seen or not. One seed.

*Gain kept*: (base - merge) / (base - specialist), mean over the three kinds, with a 95 % interval of paired
resamples of the passages: 1 is every specialist on its own text at once, 0 is the base. Sparse operators
keep the densities that `siblings.py` says, others their defaults; no factor was searched. Costs
are of whole `merge` processes, memory is the peak of anonymous memory; *regmean* and *fisher* need a pass
over each sibling's text before. mergekit 0.1.5 stands where it has the operator for three models.
"""


def rates(scores: Scores) -> dict[str, np.ndarray]:
    """Bits per byte of each domain, of all passages and then of every resample of them; paired."""
    found = {}
    for domain, score in scores.items():
        sums = resampled_sums(np.stack([score["bits"], score["bytes"]], axis=1).astype(np.float64))
        found[domain] = sums[:, 0] / sums[:, 1]
    return found


Rates = Mapping[str, np.ndarray]


def retained(start: Rates, best: Rates, end: Rates) -> Estimate:
    """The part of the specialists' gains that a merge keeps: the mean over domains of gain over gain.

    1 is as good as each specialist on its own text, 0 as the base; interval by paired resamples.
    """
    parts = [(start[domain] - end[domain]) / (start[domain] - best[domain]) for domain in start]
    drawn = np.mean(parts, axis=0)
    low, high = np.quantile(drawn[1:], [0.025, 0.975])
    return Estimate(float(drawn[0]), (float(low), float(high)))


def kept_gains(results: Mapping[str, Any]) -> dict[str, Estimate]:
    """What every parent and merge of a run retains, by name."""
    found = {name: rates(row["scores"]) for name, row in (results["parents"] | results["merges"]).items()}
    best = {domain: found[domain][domain] for domain in found["base"]}
    return {name: retained(found["base"], best, one) for name, one in found.items()}


def page(results: Mapping[str, Any]) -> str:
    """The whole page as Markdown."""
    scores = {name: row["scores"] for name, row in (results["parents"] | results["merges"]).items()}
    domains, kept = list(scores["base"]), kept_gains(results)
    order = sorted(results["merges"], key=lambda name: -kept[name].value)
    names = ("base", *domains, *order)
    timed = not results["busy"]
    rows = [_row(name, kept, scores, domains, results["merges"].get(name, {}), timed) for name in names]
    costs = ["seconds", "MB", "mergekit s", "its MB"] if timed else ["MB", "mergekit's MB"]
    head = ["model", "gain kept", *domains, "mean", *costs]
    machine = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    s = results["settings"]
    lines = [
        "# Three siblings of a language model, by every operator",
        "",
        _TEXT.format(model=results["model"], **s),
        "| " + " | ".join(head) + " |",
        "| --- |" + " ---: |" * (len(head) - 1),
        *("| " + " | ".join(cells) + " |" for cells in rows),
        "",
        *verdict(scores, domains, order),
        "",
        *([f"Not in this run: {', '.join(results['left_out'])}.", ""] if results["left_out"] else []),
        f"Machine: {machine}.",
        "",
    ]
    return "\n".join(lines)


def verdict(scores: Mapping[str, Scores], domains: Sequence[str], order: Sequence[str]) -> list[str]:
    """Which merges beat the best parent on all text together, in a sentence."""
    together = {name: _together(one) for name, one in scores.items()}
    parent = min(("base", *domains), key=lambda name: together[name][0][0] / together[name][1][0])
    units = sum(len(one["bits"]) for one in scores[parent].values())
    better = [
        name
        for name in order
        if (found := difference(together[parent], together[name], units)).value < 0
        and found.p is not None
        and found.p < 0.05
    ]
    if not better:
        sentence = f"No merge beats the best parent ({parent}) on all texts together"
        return [f"{sentence} (paired bootstrap, p < .05)."]
    return [
        f"On all three texts together the best parent is {parent}; {len(better)} of {len(order)} merges beat",
        "it (paired bootstrap, p < .05 each, not corrected for their number).",
    ]


def _together(scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    columns = [np.concatenate([np.asarray(one[key]) for one in scores.values()]) for key in ("bits", "bytes")]
    sums = resampled_sums(np.stack(columns, axis=1).astype(np.float64))
    return sums[:, 0], sums[:, 1]


def _row(
    name: str,
    kept: Mapping[str, Estimate],
    scores: Mapping[str, Scores],
    domains: Sequence[str],
    cost: Mapping[str, Any],
    timed: bool,
) -> list[str]:
    means = [sum(scores[name][domain]["bits"]) / sum(scores[name][domain]["bytes"]) for domain in domains]
    cells = [f"*{name}*" if not cost else name, "0" if name == "base" else shown(kept[name], 2)]
    cells += [f"{value:.3f}" for value in (*means, sum(means) / len(means))]
    for prefix in ("", "mergekit_"):
        if f"{prefix}seconds" not in cost:
            cells += ["-" if cost else ""] * (1 + timed)
            continue
        seconds = f"{cost[prefix + 'seconds']:.1f}"
        if not prefix and "statistics_seconds" in cost:
            seconds += f" + {cost['statistics_seconds']:.0f}"
        cells += [*([seconds] if timed else []), f"{cost[prefix + 'memory'] / 1e6:.0f}"]
    return cells
