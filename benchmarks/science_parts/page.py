"""The page of the experiments: tables with means over seeds and their spread, written from plain data."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["page"]

Runs = Sequence[Mapping[str, Any]]


def page(results: Mapping[str, Any], soup: Mapping[str, Any]) -> str:
    """The Markdown page. `soup` holds the results of benchmarks/digits_soup.py."""
    runs, size = results["runs"], results["size"]
    machine = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    widths = "-".join(map(str, size["widths"]))
    return f"""# What merging does and does not do

Written by `python -m benchmarks.merging_science --work DIR --seeds {len(runs)} --publish`: means over
{len(runs)} seeds, ± their standard deviation (of accuracies, in points). Sizes and rates were chosen at
seed 0; the other seeds had no part in that. Everything is small: multilayer perceptrons on scikit-learn's
digits (1,000 images to train, 297 to validate, 500 to test, split anew at every seed).
Accuracies are in per cent, on test images that no choice has seen. The experiments and what they should
show follow the papers named at the [operators](../docs/operators.md); what is said of language models
stands with the quickstart (experiment 7).

## The claims, and by how much they hold

A claim must hold at every seed, by the margin that it needs. Margins are fractions of 1 for accuracies.

{_claims(results["claims"])}

## 1. Exact laws

The largest distance of any seed from the law, and the smallest of a control that must not fulfill it.

{_laws(runs)}

The control of TSV-M is a limit worth knowing: task vectors of lower rank than their share (LoRA adapters
merged into weights are such) leave places that the roundings of float32 fill with unit vectors, and these
tilt the true directions. `core_space(method="tsv_m")` works in the space that the task vectors span.

## 2. Soups

From `benchmarks/digits_soup.py` (its own program and seeds; [what it shows](../docs/soups.md)):

{_soups(soup)}

## 3. Linear mode connectivity

Two networks (64-128-128-10), each trained on from a base; barriers are the most by which the loss (nats)
or the error rate on the line between them exceeds the straight line between its values at the ends.

{_connectivity(runs)}

Siblings are of one base; a network with its units re-ordered computes the same as before. mergelab has no
matching of units (Git Re-Basin's weight matching, 2209.04836): merge what has a common base.

## 4. Eight tasks in one network

Tasks are the eight symmetries of the square, applied to the images. One trunk {widths} with a head for
each task, trained on all of them for {size["base_steps"]} steps (the base); then the heads are frozen,
and eight specialists train the trunk for {size["steps"]} steps on one task each, at {size["rate"]:g}.
Mean accuracy over tasks, the task being told. *As it comes*: at the operator's defaults, models of weight
1 (sparse ones keep the fraction that `benchmarks/science_parts/eight_tasks.py` says). *Tuned*: the merged
task vector multiplied by the factor that is best on validation images, which any operator can have.

{_tasks(runs, "eight_tasks")}

`average` and `task_arithmetic` are one operator at two factors, so once tuned they differ by the grid of
factors alone. TIES is not claimed to beat tuned task arithmetic. RegMean and
Fisher take statistics of each task's training images; RegMean++ takes the inputs that merged layers make,
layer by layer. EMR keeps a mask of each task, so it is told the task in the trunk too, which no other row
is; unified alone it is one model like the others.

## 5. The limits of DARE

Specialists with 90 % of their task vector dropped at random, the rest divided by 0.1, on their own tasks.
*Distance* is the norm of the task vector over that of the base.

{_dare(runs)}

## 6. One head for all tasks: where merging fails

The same with one head for all tasks, so that the network must answer without being told the task.
*individual* is a specialist on its own task; the merges and *a specialist on all tasks* answer for all
eight. Each specialist has moved all its answers towards its own task.

{_tasks(runs, "shared_head")}

## 7. Language models

`mergelab quickstart` trains a small Llama and two specialists, merges and judges them; its page has the
figures. [Verdicts](../docs/verdict.md) do the same for models of yours.

Machine: {machine}.
"""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def _spread(values: Sequence[float], factor: float = 1.0, digits: int = 3) -> str:
    """Mean ± standard deviation over seeds."""
    scaled = [factor * value for value in values]
    mean = f"{statistics.mean(scaled):.{digits}f}"
    return mean if len(scaled) < 2 else f"{mean} ± {statistics.stdev(scaled):.{digits}f}"


def _claims(found: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for one in found:
        least = min(one["margins"])
        rows.append(
            [one["name"], f"{least:.3g}", f"{one['needed']:g}", "yes" if least >= one["needed"] else "**no**"]
        )
    return _table(["claim", "least margin", "needed", "holds"], rows)


def _laws(runs: Runs) -> str:
    rows = []
    for same in zip(*(run["identities"] for run in runs), strict=True):
        first = same[0]
        distance, control = max(one["distance"] for one in same), min(one["control"] for one in same)
        rows.append(
            [
                first["name"],
                f"{distance:.2g}",
                f"{first['allowed']:g}",
                f"{first['control_name']}: {control:.2g}",
            ]
        )
    return _table(["law", "distance", "allowed", "control"], rows)


def _soups(soup: Mapping[str, Any]) -> str:
    names = ("best_single", "greedy", "uniform", "ensemble")
    rows = [
        [key.replace("_", " "), *(f"{row[n]:.2f}" for n in names), f"{row['gain']:+.2f}",
         f"{row['wins']}/{row['seeds']}"]
        for key, row in soup.items()
    ]  # fmt: skip
    return _table(["setting", "best single", "greedy", "uniform", "ensemble", "gain", "wins"], rows)


def _connectivity(runs: Runs) -> str:
    pairs = {
        "siblings": "two siblings of one base",
        "strangers": "a sibling and a network from another start",
        "permuted": "a network and itself with its units re-ordered",
    }
    rows = [
        [
            text,
            *(_spread([run["connectivity"][f"{key}_{what}"] for run in runs]) for what in ("loss", "error")),
        ]
        for key, text in pairs.items()
    ]
    output = max(run["connectivity"]["permuted_output"] for run in runs)
    table = _table(["pair", "loss barrier", "error barrier"], rows)
    return (
        f"{table}\n\nRe-ordering changes the outputs by at most {output:.1g} of the largest logit: rounding."
    )


def _tasks(runs: Runs, experiment: str) -> str:
    tables = [run[experiment] for run in runs]

    def mean(name: str) -> float:
        return statistics.mean(table[name].get("tuned", table[name]["plain"]) for table in tables)

    rows = []
    for name in sorted(tables[0], key=mean, reverse=True):
        plain = _spread([table[name]["plain"] for table in tables], 100, 1)
        if "tuned" not in tables[0][name]:
            rows.append([f"*{name}*", plain, "", ""])
            continue
        tuned = _spread([table[name]["tuned"] for table in tables], 100, 1)
        factors = ", ".join(f"{table[name]['scale']:g}" for table in tables)
        rows.append([name, plain, tuned, factors])
    return _table(["merge", "as it comes", "tuned", "factors"], rows)


def _dare(runs: Runs) -> str:
    shown = ("whole", "dare", "without_rescaling")
    rows = [
        [text, _spread([run[key]["distance"] for run in runs], 1, 2),
         *(_spread([run[key][name] for run in runs], 100, 1) for name in shown)]
        for key, text in (("dare_small", "small"), ("dare_large", "large"))
    ]  # fmt: skip
    return _table(["task vectors", "distance", "whole", "DARE at 0.9", "without rescaling"], rows)
