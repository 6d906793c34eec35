"""Times merges of four 0.494B-parameter checkpoints: mergelab, mergekit 0.1.5 and the floor, side by side.

    python -m benchmarks.merge --work DIR [--mergekit-env VENV] [--publish]

Every measurement is a whole process. The programs take turns, so that a machine that slows down slows them
all; the table gives medians. `--publish` writes the table into benchmarks/README.md and README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.cases import CASES, Case
from benchmarks.family import QWEN2_0_5B, TINY, build_family
from benchmarks.machine import describe
from benchmarks.process import measure
from benchmarks.table import publish, render

__all__ = ["main"]

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results" / "merge.json"
ROUNDS = 3
"""Passes of the floor, and runs of mergelab, in a turn."""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark as the command line asks; returns what it measured."""
    options = _parse(arguments)
    work = options.work.resolve()
    shape = TINY if options.quick else QWEN2_0_5B
    family = build_family(work / ("tiny" if options.quick else "models"), shape, options.shards)
    _read_once(family.values())
    bench = Bench(work, family, options.mergekit_env)

    rows: dict[str, list[dict[str, float]]] = {name: [] for name in options.only}
    start_up: list[dict[str, float]] = []
    for turn in range(options.repeats):
        start_up.append(bench.start_up())
        for name in options.only:
            kept = work / "kept" / f"{name}-{turn}.json"
            if not (options.go_on and kept.exists()):
                found = bench.run(CASES[name])
                kept.parent.mkdir(exist_ok=True)
                kept.write_text(json.dumps(found))
                print(f"{turn + 1}/{options.repeats} {name}: {_brief(found)}", file=sys.stderr)
            rows[name].append(json.loads(kept.read_text()))
    results = {
        "machine": describe(work),
        "parameters": shape.parameters,
        "repeats": options.repeats,
        "passes": ROUNDS,
        "start_up": _medians(start_up),
        "cases": {
            name: {
                "inputs": len(CASES[name].inputs),
                "aim": CASES[name].aim,
                "against": CASES[name].against,
                "runs": runs,
                "median": _medians(runs),
            }
            for name, runs in rows.items()
        },
    }
    (options.json or work / "merge.json").write_text(json.dumps(results, indent=1))
    print(render(results))
    if options.publish:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        publish(results, REPOSITORY)
    return results


class Bench:
    """The programs that are timed, and where they work."""

    def __init__(self, work: Path, family: dict[str, Path], mergekit: Path | None) -> None:
        self.work, self.family, self.mergekit = work, family, mergekit
        self.folder = next(iter(family.values())).parent
        self.tiny = next(iter(build_family(work / "tiny", TINY).values())).parent
        paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)}

    def start_up(self) -> dict[str, float]:
        """Seconds of `--help`."""
        seconds = {"mergelab": measure([*self._python("mergelab"), "--help"], cwd=self.folder, env=self.env)}
        if self.mergekit:
            seconds["mergekit"] = measure([self._mergekit(), "--help"], cwd=self.folder)
        return {program: measured.seconds for program, measured in seconds.items()}

    def run(self, case: Case) -> dict[str, float]:
        """One turn of a case: floor and mergelab in alternation, then mergekit; outputs are deleted at once.

        How long it takes to write depends on whether free pages are at hand or a virtual machine has to get
        them from its host: the same pass of the floor takes a second more or less. Hence the fastest of
        several passes for what is compared with the floor; whole processes are medians.
        """
        recipe = self.work / f"{case.method}.yaml"
        recipe.write_text(yaml.safe_dump(case.recipe(), sort_keys=False))
        passes = 1 if case.against else ROUNDS  # those are minutes, not seconds
        rounds = [self._floor(case) | self._ours(recipe) for _ in range(passes)]
        columns = {name: [one[name] for one in rounds] for name in rounds[0]}
        found = {
            "floor_seconds": min(columns["floor_seconds"]),
            "mergelab_work_seconds": min(columns["mergelab_seconds"]) - self._started(recipe),
            "mergelab_streaming_seconds": min(columns["mergelab_streaming_seconds"]),
            "mergelab_seconds": statistics.median(columns["mergelab_seconds"]),
            "mergelab_anonymous_bytes": max(columns["mergelab_anonymous_bytes"]),
        }
        return found | (self._theirs(recipe) if self.mergekit and not case.against else {})

    def _floor(self, case: Case) -> dict[str, float]:
        out = self.work / "floor.out"
        seconds, files = 0.0, [sorted(self.family[name].glob("*.safetensors")) for name in case.inputs]
        for shard in zip(*files, strict=True):
            command = [*self._python("benchmarks.floor"), *map(str, shard), "--out", str(out)]
            seconds += json.loads(measure(command, cwd=self.folder, env=self.env).stdout)["seconds"]
            out.unlink()
        return {"floor_seconds": seconds}

    def _started(self, recipe: Path) -> float:
        """Seconds of the same merge of models too small to matter: imports, planning, programs, an output."""
        runs = [self._ours(recipe, self.tiny) for _ in range(ROUNDS)]
        return statistics.median(run["mergelab_seconds"] for run in runs)

    def _ours(self, recipe: Path, folder: Path | None = None) -> dict[str, float]:
        out = self.work / "mergelab.out"
        command = [*self._python("mergelab"), "merge", str(recipe), "--out", str(out), "--json"]
        run = measure(command, cwd=folder or self.folder, env=self.env)
        shutil.rmtree(out)
        return {
            "mergelab_streaming_seconds": json.loads(run.stdout)["seconds_streaming"],
            "mergelab_seconds": run.seconds,
            "mergelab_anonymous_bytes": run.peak_anonymous,
        }

    def _theirs(self, recipe: Path) -> dict[str, float]:
        out = self.work / "mergekit.out"
        environment = {name: value for name, value in self.env.items() if name != "PYTHONPATH"}
        # Its model card asks a server about every model name, and fails without one.
        command = [self._mergekit(), str(recipe), str(out), "--quiet", "--no-write-model-card"]
        run = measure(command, cwd=self.folder, env=environment)
        shutil.rmtree(out)
        return {"mergekit_seconds": run.seconds, "mergekit_anonymous_bytes": run.peak_anonymous}

    def _python(self, module: str) -> list[str]:
        return [sys.executable, "-m", module]

    def _mergekit(self) -> str:
        return str(self.mergekit and self.mergekit / "bin" / "mergekit-yaml")


def _read_once(folders: Any) -> None:
    """Brings every input into the page cache."""
    buffer = bytearray(16 << 20)
    for folder in folders:
        for path in folder.glob("*.safetensors"):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def _medians(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def _brief(run: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in run.items())


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.merge")
    parser.add_argument("--work", type=Path, required=True, help="folder for models (4 GB, kept) and outputs")
    parser.add_argument("--mergekit-env", type=Path, help="virtual environment that holds mergekit 0.1.5")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shards", type=int, default=1, help="weight files per model")
    parser.add_argument("--quick", action="store_true", help="a tiny model: shows that it runs, not how fast")
    parser.add_argument(
        "--go-on", action="store_true", help="keep the cases that DIR holds of an earlier call"
    )
    parser.add_argument("--json", type=Path, help="where the measurements go (default: merge.json in --work)")
    parser.add_argument("--publish", action="store_true", help="write the tables of the READMEs")
    options = parser.parse_args(arguments)
    if options.mergekit_env and not (options.mergekit_env / "bin" / "mergekit-yaml").is_file():
        parser.error(f"--mergekit-env {options.mergekit_env}: no bin/mergekit-yaml there")
    if options.publish and options.quick:
        parser.error("--publish writes figures of the full-size models: leave --quick out")
    if missing := {against for name in options.only if (against := CASES[name].against)} - set(options.only):
        parser.error(f"--only: also {', '.join(sorted(missing))}, which others are measured against")
    options.work.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    main()
