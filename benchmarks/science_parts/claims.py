"""What the experiments are said to show, as inequalities with margins that every seed must keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["Claim", "claims"]

Run = Mapping[str, Any]
_PLAIN = ("average", "task_arithmetic", "ties")


class Claim(NamedTuple):
    """A statement, by how much each seed fulfills it, and by how much it must."""

    name: str
    margins: list[float]
    needed: float

    @property
    def holds(self) -> bool:
        return min(self.margins) >= self.needed


def _tasks(name: str, kind: str = "tuned") -> Callable[[Run], float]:
    return lambda run: run["eight_tasks"][name][kind]


def _over(a: Callable[[Run], float], b: Callable[[Run], float]) -> Callable[[Run], float]:
    return lambda run: a(run) - b(run)


def _best_of_shared(run: Run) -> float:
    table = run["shared_head"]
    return max(row["tuned"] for row in table.values() if "tuned" in row)


_CLAIMS: Sequence[tuple[str, Callable[[Run], float], float]] = (
    ("TSV-M > Iso-C, as they come", _over(_tasks("tsv_m", "plain"), _tasks("iso_c", "plain")), 0.002),
    ("TSV-M > task arithmetic, both tuned", _over(_tasks("tsv_m"), _tasks("task_arithmetic")), 0.01),
    ("Iso-C > task arithmetic, both tuned", _over(_tasks("iso_c"), _tasks("task_arithmetic")), 0.005),
    ("task arithmetic, tuned > average", _over(_tasks("task_arithmetic"), _tasks("average", "plain")), 0.0),
    ("average > base", _over(_tasks("average", "plain"), _tasks("base", "plain")), 0.005),
    ("average > sum (task arithmetic at 1)",
     _over(_tasks("average", "plain"), _tasks("task_arithmetic", "plain")), 0.02),
    ("siblings of one base: loss barrier below 0.05", lambda r: 0.05 - r["connectivity"]["siblings_loss"], 0),
    ("independent starts: loss barrier above 0.2", lambda r: r["connectivity"]["strangers_loss"] - 0.2, 0),
    ("units re-ordered: outputs differ below 1e-5", lambda r: 1e-5 - r["connectivity"]["permuted_output"], 0),
    ("small task vectors: DARE at 0.9 costs less than 2 points",
     lambda r: 0.02 - (r["dare_small"]["whole"] - r["dare_small"]["dare"]), 0),
    ("large task vectors: DARE at 0.9 costs more than on small ones",
     lambda r: (r["dare_large"]["whole"] - r["dare_large"]["dare"])
     - (r["dare_small"]["whole"] - r["dare_small"]["dare"]), 0.01),
    ("shared head: average, task arithmetic and TIES, as they come, below the base",
     lambda r: r["shared_head"]["base"]["plain"]
     - max(r["shared_head"][name]["plain"] for name in _PLAIN), 0.02),
    ("shared head: the best merge, tuned, far below specialists told the task",
     lambda r: r["shared_head"]["individual"]["plain"] - _best_of_shared(r), 0.1),
)  # fmt: skip


def claims(runs: Sequence[Run]) -> list[Claim]:
    """Every statement with its margin at each seed; identities count how far within they are, relatively."""
    found = [Claim(name, [of(run) for run in runs], needed) for name, of, needed in _CLAIMS]
    laws = [[1 - law["distance"] / law["allowed"] for law in run["identities"]] for run in runs]
    controls = [[law["control"] / law["allowed"] - 1 for law in run["identities"]] for run in runs]
    return [
        *found,
        Claim("every exact law within its tolerance", [min(one) for one in laws], 0),
        Claim("every control of an exact law outside it", [min(one) for one in controls], 0),
    ]
