"""Compares the SAEs that trainers make of toy activations at equal budgets: error, dead latents, recovery.

    python -m benchmarks.sae_quality --work DIR --peers-env VENV [--publish]

Every trainer sees the same activations in the same order and is judged by the same code on activations that
none of them saw. Results are kept in DIR after every training, so that a run that was stopped goes on where
it stood.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe
from benchmarks.sae_peers.problem import TRAINERS, Arrays, decode, encode
from benchmarks.sae_presets import PRESETS, Preset
from benchmarks.sae_step import REPOSITORY, run_worker
from benchmarks.table import replace_section
from mergelab.sae.evaluation.reconstruction import Totals
from mergelab.sae.features.matching import matched_cosine, recovery
from mergelab.sae.toy import BLOCK_ROWS, ToyGroundTruth

__all__ = ["Bench", "judge", "main", "render"]

RESULTS = REPOSITORY / "benchmarks" / "results" / "sae_quality.json"

OURS = ("mergelab", "frozen decoder", "random")
PEERS = ("sparsify+Adam", "SAELens", "dictionary_learning")

FACTORS = (2.0, 4.0, 8.0)
"""The sweep: multiples of a trainer's own default learning rate, besides that itself."""

_JUDGED_ON = 64 * BLOCK_ROWS
_SAMPLE = 32 * BLOCK_ROWS
_FIGURES = ("nmse", "dead", "mean_max_cosine", "above", "mcc")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark as the command line asks; returns what it found."""
    options = _parse(arguments)
    bench = Bench(options.work, options.peers_env)
    for preset in options.presets:
        for seed in range(options.seeds):
            for program in options.programs:
                bench.run(preset, program, seed)
        # The best rate is chosen at the first seed, and then used at all.
        for program in options.programs:
            if program in OURS or options.no_sweep:
                continue
            base = bench.run(preset, program, 0)["learning_rate"]
            for factor in FACTORS:
                bench.run(preset, program, 0, factor * base)
            best = bench.best_rate(preset, program)
            for seed in range(options.seeds):
                bench.run(preset, program, seed, best)
    bench.forget_rows()
    print(render(bench.results))
    if options.publish:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(bench.results, indent=1) + "\n")
        page = REPOSITORY / "benchmarks" / "README.md"
        text = replace_section(page.read_text(encoding="utf-8"), "sae quality table", render(bench.results))
        page.write_text(text, encoding="utf-8")
    return bench.results


class Bench:
    """Trains and judges, each setting once, and remembers."""

    def __init__(self, work: Path, peers: Path | None) -> None:
        self.work, self.peers = work, peers
        self.file = work / "sae_quality.json"
        self.results: dict[str, Any] = {"machine": describe(work), "runs": {}}
        if self.file.is_file():
            self.results = json.loads(self.file.read_text())
        self.rows_of: ToyGroundTruth | None = None

    def run(self, preset: str, program: str, seed: int, rate: float | None = None) -> dict[str, Any]:
        """The figures of one training; `rate` None is the program's default learning rate."""
        default = self.results["runs"].get(f"{preset}/{program}/default/{seed}")
        if rate is not None and default and rate == default["learning_rate"]:
            return default
        key = f"{preset}/{program}/{'default' if rate is None else f'{rate:.4g}'}/{seed}"
        if key not in self.results["runs"]:
            started = time.perf_counter()
            found = self._train(PRESETS[preset], program, seed, rate)
            found["seconds"] = time.perf_counter() - started
            self.results["runs"][key] = found
            self.file.write_text(json.dumps(self.results, indent=1))
            brief = ", ".join(f"{name} {found[name]:.4f}" for name in _FIGURES)
            print(f"{key}: {brief} ({found['seconds']:.0f} s)", file=sys.stderr)
        return self.results["runs"][key]

    def best_rate(self, preset: str, program: str) -> float:
        """The learning rate with the lowest error at the first seed."""
        first = [run for key, run in self.results["runs"].items() if _parts(key)[::3] == (preset, "0")
                 and _parts(key)[1] == program]  # fmt: skip
        return min(first, key=lambda run: run["nmse"])["learning_rate"]

    def forget_rows(self) -> None:
        """Deletes the activations, which can be drawn again."""
        self.rows_of = None
        for name in ("rows.npy", "sample.npy", "arrays.npz"):
            (self.work / name).unlink(missing_ok=True)

    def _train(self, preset: Preset, program: str, seed: int, rate: float | None) -> dict[str, Any]:
        problem = replace(preset.problem, seed=seed, learning_rate=rate)
        truth = replace(preset.truth, seed=seed, rows=problem.steps * problem.batch)
        if truth != self.rows_of:
            _write_rows(truth, self.work / "rows.npy")
            np.save(self.work / "sample.npy", truth.sample(_SAMPLE, seed=1))
            self.rows_of = truth
        files = {"rows": "rows.npy", "sample": "sample.npy", "out": "arrays.npz"}
        asked = {"do": "train", "trainer": program, "problem": asdict(problem)}
        done = run_worker(
            {**asked, **{name: str(self.work / file) for name, file in files.items()}}, self.peers
        )
        with np.load(self.work / "arrays.npz") as arrays:
            return judge(dict(arrays), truth, problem.k) | done


def judge(arrays: Arrays, truth: ToyGroundTruth, k: int, judged_on: int = _JUDGED_ON) -> dict[str, float]:
    """The figures of a top-k SAE on activations that no training sees."""
    rows = truth.sample(judged_on, seed=2)
    totals = Totals.zero(rows, len(arrays["W_dec"]))
    for start in range(0, len(rows), BLOCK_ROWS):
        x = rows[start : start + BLOCK_ROWS]
        values, indices = encode(arrays, x, k)
        totals = totals.add(x, decode(arrays, values, indices), (values, indices))
    found = totals.result()
    recovered = recovery(truth.features, arrays["W_dec"])
    return {
        "nmse": found.nmse,
        "l0": found.l0,
        "dead": 1 - found.alive,
        "mean_max_cosine": recovered.mean_max_cosine,
        "above": recovered.above,
        "mcc": matched_cosine(truth.features, arrays["W_dec"]),
    }


def render(results: Mapping[str, Any]) -> str:
    """A table for each preset: a row for each program at its default and at its best learning rate."""
    head = ["program", "learning rate", "NMSE", "dead", "mean max cosine", "> .9", "MCC", "seeds"]
    lines: list[str] = []
    for name in PRESETS:
        rows = [
            _row(program, setting, runs, PRESETS[name].aims)
            for program, setting, runs in _settings(name, results["runs"])
        ]
        if rows:
            p, truth = PRESETS[name].problem, PRESETS[name].truth
            lines += [
                f"**{name}**: {truth.n_features} features in {truth.d_in} dimensions, {truth.l0:g} on, "
                f"frequencies `i^-{truth.exponent:g}`; {p.n} latents, k={p.k}, {p.steps * p.batch:,} "
                f"activations in batches of {p.batch}.",
                "",
                *(f"| {' | '.join(cells)} |" for cells in (head, ["---", "---", *["---:"] * 6], *rows)),
                "",
            ]
    machine = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    return "\n".join(
        [
            *lines,
            "Means over seeds (of truth, data, initial parameters), ± their standard deviation. Figures in "
            f"bold miss their aim. Machine: {machine}.",
        ]
    )


def _settings(
    preset: str, runs: Mapping[str, dict[str, Any]]
) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    for program in TRAINERS:
        mine = {_parts(key)[2:]: run for key, run in runs.items() if _parts(key)[:2] == (preset, program)}
        default = [run for (rate, _), run in mine.items() if rate == "default"]
        if not default:
            continue
        automatic = "automatic" if program == "mergelab" else f"default, {default[0]['learning_rate']:.2g}"
        yield program, "" if program == "random" else automatic, default
        first = {rate: run for (rate, seed), run in mine.items() if seed == "0"}
        if len(first) > 1:
            best = min(first, key=lambda rate: first[rate]["nmse"])
            chosen = [run for (rate, _), run in mine.items() if rate == best]
            yield program, f"best of {len(first)}, {first[best]['learning_rate']:.2g}", chosen


def _row(program: str, setting: str, runs: Sequence[dict[str, Any]], aims: Mapping[str, float]) -> list[str]:
    cells = []
    for name in _FIGURES:
        values = [run[name] for run in runs]
        mean = statistics.mean(values)
        text = (
            f"{mean:.1%}" if name in ("dead", "above") else f"{mean:.4f}" if name == "nmse" else f"{mean:.3f}"
        )
        aim = aims.get(name) if program == "mergelab" else None
        if aim is not None and (mean < aim if name == "mean_max_cosine" else mean > aim):
            text = f"**{text}**"
        if name == "nmse" and len(values) > 1:
            text += f" ± {statistics.stdev(values):.4f}"
        cells.append(text)
    return [program, setting, *cells, str(len(runs))]


def _write_rows(truth: ToyGroundTruth, path: Path) -> None:
    """Draws all activations once, for all trainers of this truth."""
    rows = np.lib.format.open_memmap(path, "w+", np.float32, (truth.rows, truth.d_in))
    for start in range(0, truth.rows, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, truth.rows)
        rows[start:stop] = truth.read(start, stop)
    rows.flush()


def _parts(key: str) -> tuple[str, ...]:
    return tuple(key.split("/"))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sae_quality")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for activations (1.3 GB) and results"
    )
    parser.add_argument("--peers-env", type=Path, help="virtual environment of the peers")
    full = [name for name in PRESETS if name != "tiny"]
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=full, metavar="PRESET")
    programs = [*OURS, *PEERS]
    parser.add_argument("--programs", nargs="+", choices=TRAINERS, default=programs, metavar="PROGRAM")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--no-sweep", action="store_true", help="peers at their default learning rate only")
    parser.add_argument("--quick", action="store_true", help="a tiny truth: shows that it runs")
    parser.add_argument("--publish", action="store_true", help="write the tables of benchmarks/README.md")
    options = parser.parse_args(arguments)
    if options.quick:
        options.presets, options.seeds = ["tiny"], 1
    if set(options.programs) - set(OURS) and not options.peers_env:
        parser.error("the peers need an environment of their own: --peers-env VENV, or --programs mergelab")
    if options.peers_env and not (options.peers_env / "bin" / "python").is_file():
        parser.error(f"--peers-env {options.peers_env}: no bin/python there")
    if options.publish and options.quick:
        parser.error("--publish writes figures of the full presets: leave --quick out")
    options.work.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    main()
