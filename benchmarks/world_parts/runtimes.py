"""Runtimes as they are: a selection of the tests under the versions of Colab and Kaggle, and the newest.

Needs Python 3.11, 3.12 and 3.13 on this machine, and an index of packages. Each row is an environment of its
own.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.world_parts.environments import interpreter, make, versions
from benchmarks.world_parts.section import Place, Section

__all__ = ["RUNTIMES", "Counts", "Runtime", "measure", "read_counts"]

REPOSITORY = Path(__file__).parents[2]
SELECTION = ("tests/operators", "tests/checkpoints", "tests/models")
"""What runs in each: the merge algebra, files, and models."""
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")


@dataclass(frozen=True)
class Runtime:
    """One environment: its name in the table, its Python, and its file of pinned versions, if it has one."""

    name: str
    python: str
    pins: str | None = None


RUNTIMES = (
    Runtime("Colab", "3.13", ".ci/colab.txt"),
    Runtime("Kaggle", "3.12", ".ci/kaggle.txt"),
    Runtime("newest that pip gives", "3.11"),
    Runtime("newest that pip gives", "3.12"),
    Runtime("newest that pip gives", "3.13"),
)


@dataclass(frozen=True)
class Counts:
    """Tests of one run."""

    passed: int
    failed: int
    skipped: int


def measure(place: Place) -> Section:
    """Makes each environment, and runs the selection in it.

    Raises:
        RuntimeError: no Python of a version is here, or pip or pytest did not get as far as the tests.
    """
    rows: list[Sequence[str]] = []
    for runtime in RUNTIMES:
        kind = runtime.name.split()[0].lower()
        folder = place.environments / f"{kind}-{runtime.python}"
        pins = ["-c", str(REPOSITORY / runtime.pins)] if runtime.pins else []
        wanted = [*pins, "-e", f"{REPOSITORY}[test]"]
        programs = make(folder, interpreter(runtime.python), [wanted])
        found = versions(programs, PACKAGES)
        counts = _run(programs, place.work / f"{folder.name}.xml")
        tests = (str(number) for number in (counts.passed, counts.failed, counts.skipped))
        rows.append((runtime.name, *found.values(), *tests))
    note = (
        f"`pytest {' '.join(SELECTION)}` in an environment of its own each: the pinned versions of "
        f"{' and '.join(f'`{runtime.pins}`' for runtime in RUNTIMES if runtime.pins)}, and what pip chooses "
        "freely."
    )
    return Section(note, ("runtime", "Python", *PACKAGES, "passed", "failed", "skipped"), rows)


def _run(programs: Path, report: Path) -> Counts:
    command = [str(programs / "python"), "-m", "pytest", "-q", f"--junitxml={report}", *SELECTION]
    environment: Mapping[str, str] = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):  # 1 is a failed test, which is counted
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-3000:]}")
    return read_counts(report)


def read_counts(report: Path) -> Counts:
    """The counts of pytest's XML report; an error of a fixture counts as a failure."""
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    total, failures, errors, skipped = (
        int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")
    )
    return Counts(total - failures - errors - skipped, failures + errors, skipped)
