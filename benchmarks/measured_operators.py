"""Writes docs/measured_operators.md: what every operator did in recorded runs of the benchmarks, as a table.

    python -m benchmarks.measured_operators

It measures nothing itself: figures come from results/siblings.json, merging_science.json and merge.json.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.sibling_page import kept_gains
from benchmarks.siblings import MERGES
from mergelab.operators import OPERATORS
from mergelab.verdict.bootstrap import shown

__all__ = ["PAGE", "render"]

FOLDER = Path(__file__).resolve().parent
PAGE = FOLDER.parent / "docs" / "measured_operators.md"

_HEAD = """\
# Measured operators

Written by `python -m benchmarks.measured_operators` from recorded runs; a test keeps it current. What each
operator computes and what it is for stands at the [operators](operators.md).

- **Siblings**: three fine-tunes of SmolLM2-135M-Instruct on three kinds of text, merged with the base.
  *Kept* is the mean part of the specialists' gains in bits per byte on held-out text, with a 95 % interval
  ([page](../benchmarks/siblings.md)); memory is the peak of the whole merge.
- **Eight tasks**: mean accuracy in per cent of a small network's eight specialists merged, the task told,
  as it comes and with its factor tuned, over four seeds; the base has {base}, the specialists {best}
  ([page](../benchmarks/merging_science.md)).
- **0.5B**: streaming four 0.494B checkpoints, as a multiple of reading, writing and syncing the bytes
  ([page](../benchmarks/README.md)); of iso_c and tsv_m as a multiple of linear.

Settings are those of the programs. A dash is an operator that takes other numbers of models, needs data
that the run had not, or was not in it. One model and one set of texts are not a ranking: measure
[yours](verdict.md).
"""


def render() -> str:
    """The whole page."""
    results = {
        name: json.loads((FOLDER / "results" / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("siblings", "merging_science", "merge")
    }
    gains, tasks = (
        kept_gains(results["siblings"]),
        [run["eight_tasks"] for run in results["merging_science"]["runs"]],
    )
    lines = ["| operator | kept | memory MB | eight tasks | tuned | 0.5B |", "| --- |" + " ---: |" * 5]
    for name in OPERATORS:
        ours = [row for row, (method, _, _) in MERGES.items() if method == name and row in gains]
        for row in ours or [None]:
            cost = results["siblings"]["merges"][row] if row else {}
            cells = [
                f"[{row or name}](operators.md#{name})",
                shown(gains[row], 2) if row else "-",
                f"{cost['memory'] / 1e6:.0f}" if row else "-",
                *_accuracies(tasks, row or name),
                _speed(results["merge"]["cases"], name),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    text = _HEAD.format(base=_mean(tasks, "base", "plain"), best=_mean(tasks, "individual", "plain"))
    return "\n".join([text, *lines, ""])


def _accuracies(runs: list[Mapping[str, Any]], name: str) -> tuple[str, str]:
    known = {"linear": "average", "task_arithmetic, 1": "task_arithmetic", "emr, unified": "emr (unified)"}
    name = known.get(name, name)
    if name not in runs[0]:
        return "-", "-"
    return _mean(runs, name, "plain"), _mean(runs, name, "tuned")


def _mean(runs: list[Mapping[str, Any]], name: str, kind: str) -> str:
    return f"{100 * statistics.fmean(run[name][kind] for run in runs):.1f}"


def _speed(cases: Mapping[str, Any], name: str) -> str:
    if name not in cases:
        return "-"
    case, median = cases[name], cases[name]["median"]
    against = case["against"]
    least = cases[against]["median"]["mergelab_work_seconds"] if against else median["floor_seconds"]
    return f"{median['mergelab_work_seconds'] / least:.1f}" + (f" x {against}" if against else "")


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
