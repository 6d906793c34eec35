"""Times one full training step of a top-k SAE: mergelab against sparsify, SAELens and dictionary_learning.

    python -m benchmarks.sae_step --work DIR --peers-env VENV [--publish]

Every turn of every program is a process of its own on two threads, and the programs take turns, so that a
machine that slows down slows them all; start-up, initialization and the first steps are not counted.
`--publish` writes the table into benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from benchmarks.sae_peers.problem import TRAINERS, Problem
from benchmarks.table import replace_section

__all__ = ["CASES", "PROGRAMS", "main", "render", "run_worker"]

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results" / "sae_step.json"

PROGRAMS = ("mergelab", "mergelab bfloat16", "sparsify+Adam", "SAELens", "dictionary_learning")

CASES = {
    "A": Problem(d=768, n=8192, k=32, batch=1024, steps=10_000, auxiliary=True),
    "B": Problem(d=768, n=32768, k=32, batch=2048, steps=10_000, auxiliary=True),
    "C": Problem(d=2048, n=65536, k=64, batch=1024, steps=10_000, auxiliary=True),
    "tiny": Problem(d=32, n=256, k=4, batch=64, steps=10_000, auxiliary=True),
}
"""What is timed; `tiny` shows that it runs."""

DEAD = (0.0, 0.1)

_FREE = 0.8  # of the best matrix product: below it, another program had the processor

AIMS = {("A", 0.0): 1.5, ("B", 0.0): 2.5, ("C", 0.0): 2.5}
"""Times as fast as sparsify; with dead latents, 2 times as fast as every peer."""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark as the command line asks; returns what it measured."""
    options = _parse(arguments)
    cached = options.work / "sae_step.json"
    results: dict[str, Any] = {"machine": describe(options.work), "load": os.getloadavg()[0], "runs": {}}
    if options.resume and cached.is_file():
        results = json.loads(cached.read_text())
    for turn in range(options.repeats):
        for case in options.only:
            for dead in options.dead:
                for program in options.programs:
                    runs = results["runs"].setdefault(f"{case}/{dead}/{program}", [])
                    if len(runs) > turn:
                        continue
                    runs.append(_undisturbed(program, CASES[case], dead, options, results["runs"]))
                    cached.write_text(json.dumps(results, indent=1))
                    speed = runs[-1]["tokens_per_second"]
                    print(f"{turn + 1}: {case} dead {dead} {program}: {speed:.0f} tokens/s", file=sys.stderr)
    print(render(results))
    if options.publish:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        page = REPOSITORY / "benchmarks" / "README.md"
        page.write_text(replace_section(page.read_text(encoding="utf-8"), "sae step table", render(results)))
    return results


def run_worker(asked: Mapping[str, Any], peers: Path | None) -> dict[str, Any]:
    """Runs `benchmarks.sae_peers.worker` in the environment of its trainer; returns what it printed.

    Raises:
        RuntimeError: it failed; the message holds the end of what it wrote to stderr.
    """
    own = TRAINERS[asked["trainer"]] == "ours"
    python = sys.executable if own or peers is None else str(peers / "bin" / "python")
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)  # simulated devices would share the threads
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [python, "-m", "benchmarks.sae_peers.worker", json.dumps(asked)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{asked['trainer']} failed ({done.returncode}):\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _undisturbed(
    program: str, problem: Problem, dead: float, options: argparse.Namespace, runs: Mapping[str, Any]
) -> dict[str, float]:
    """A turn in which the machine was free, as far as that can be had.

    One whose matrix product, timed in the same process after the steps, ran well below the best that its
    library has shown is taken again; the least disturbed is kept.
    """
    best = max((run["gemm_flops"] for run in _of_library(program, runs)), default=0.0)
    turns: list[dict[str, float]] = []
    while len(turns) <= options.retakes:
        back_memory()
        turns.append(_turn(program, problem, dead, options))
        if turns[-1]["gemm_flops"] >= _FREE * best:
            break
    return max(turns, key=lambda turn: turn["gemm_flops"])


def back_memory(nbytes: int = 4 << 30) -> None:
    """Touches and frees memory, so that no program pays for pages that a virtual machine has yet to get.

    A first touch of such a page costs many times a later one, and whoever runs first would pay for all.
    """
    program = f"b = bytearray({nbytes})\nfor i in range(0, len(b), 4096): b[i] = 1"
    subprocess.run([sys.executable, "-c", program], check=True)


def _of_library(program: str, runs: Mapping[str, Any]) -> list[dict[str, float]]:
    """All turns whose matrix product ran on the same library, XLA or torch."""
    own = program.startswith("mergelab")
    return [run for key, group in runs.items() if ("/mergelab" in key) == own for run in group]


def _turn(program: str, problem: Problem, dead: float, options: argparse.Namespace) -> dict[str, float]:
    asked = {"do": "time", "trainer": program, "problem": asdict(problem), "dead": dead}
    found = run_worker({**asked, "seconds": options.seconds}, options.peers_env)
    return {
        "tokens_per_second": problem.batch / statistics.median(found["seconds"]),
        "best_tokens_per_second": problem.batch / min(found["seconds"]),
        "gemm_flops": found["gemm_flops"],
        "peak_bytes": found["peak_bytes"],
    }


def needed_flops(problem: Problem) -> int:
    """Per token: the encoder's product, and what k active latents need in the decoder and both gradients."""
    return 2 * problem.d * problem.n + 8 * problem.k * problem.d


def render(results: Mapping[str, Any]) -> str:
    """The table: one row per case and program, then the machine."""
    head = ["case", "program", "tokens/s", "mergelab is times as fast", "aim", "of peak GEMM", "memory MB"]
    runs: Mapping[str, list[dict[str, float]]] = results["runs"]
    products = {
        library: [run["gemm_flops"] for run in _of_library(program, runs)]
        for library, program in (("XLA", "mergelab"), ("torch", "peers"))
    }
    peak = max(flops for found in products.values() for flops in found)
    rows = []
    for name, group in runs.items():
        case, dead, program = name.split("/")
        speed, memory = _median(group, "tokens_per_second"), _median(group, "peak_bytes")
        own = runs.get(f"{case}/{dead}/mergelab")
        label = f"{case}, {float(dead):.0%} dead" if float(dead) else f"{case}, none dead"
        ratio, aim = "", _aim(case, float(dead), program)
        if own and program != "mergelab":
            found = _median(own, "tokens_per_second") / speed
            ratio = f"{found:.2f}" if aim is None or found >= aim else f"**{found:.2f}**"
        part = speed * needed_flops(CASES[case]) / peak
        figures = [f"{speed:,.0f}", ratio, f"{aim:g}" if aim else "", f"{part:.0%}", f"{memory / 1e6:,.0f}"]
        rows.append([label, program, *figures])
    turns = sorted({len(group) for group in runs.values()})
    peaks = [
        f"{name} {max(found) / 1e9:.0f} (in the most disturbed turn {min(found) / 1e9:.0f})"
        for name, found in products.items()
        if found
    ]
    machine = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---", "---", *["---:"] * 5], *rows)) + (
        f"\n\nMedians of {' to '.join(map(str, turns))} turns, float32, two threads. Fastest product of two "
        f"2048 x 2048 matrices in this run, GFLOP/s: {', '.join(peaks)}. Load average of the machine at the "
        f"start: {results['load']:.1f}. Machine: {machine}."
    )


def _aim(case: str, dead: float, program: str) -> float | None:
    if program.startswith("mergelab") or case == "tiny":
        return None
    if dead:
        return 2.0
    return AIMS[case, dead] if program.startswith("sparsify") else None


def _median(runs: Sequence[Mapping[str, float]], name: str) -> float:
    return statistics.median(run[name] for run in runs)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sae_step")
    parser.add_argument("--work", type=Path, required=True, help="folder for the measurements")
    parser.add_argument("--peers-env", type=Path, help="virtual environment of the peers")
    parser.add_argument("--only", nargs="+", choices=CASES, default=["A", "B", "C"], metavar="CASE")
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS), metavar="PROGRAM")
    parser.add_argument(
        "--dead", nargs="+", type=float, default=list(DEAD), help="parts of latents that are dead"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10, help="least seconds of timed steps in a turn")
    parser.add_argument("--retakes", type=int, default=2, help="how often a disturbed turn is taken again")
    parser.add_argument("--resume", action="store_true", help="keep the turns that --work holds already")
    parser.add_argument("--quick", action="store_true", help="a tiny case: shows that it runs, not how fast")
    parser.add_argument("--publish", action="store_true", help="write the table of benchmarks/README.md")
    options = parser.parse_args(arguments)
    if options.quick:
        options.only, options.repeats, options.seconds, options.retakes = ["tiny"], 1, 0.1, 0
    if any(TRAINERS[program] != "ours" for program in options.programs) and not options.peers_env:
        parser.error("the peers need an environment of their own: --peers-env VENV, or --programs mergelab")
    if options.peers_env and not (options.peers_env / "bin" / "python").is_file():
        parser.error(f"--peers-env {options.peers_env}: no bin/python there")
    if options.publish and options.quick:
        parser.error("--publish writes figures of the full-size cases: leave --quick out")
    options.work.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    main()
