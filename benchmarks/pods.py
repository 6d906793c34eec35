"""What a training step reads, exchanges and keeps on a pod, by compiled programs; what processes cost here.

    python -m benchmarks.pods [--paper] [--processes] [--work DIR]

`--paper` compiles the step of `CONFIG` for 8, 64 and 256 chips that are not there (extra: tpu-aot) and counts what
each host of four chips reads, exchanges and keeps, against the least that any program must. `--processes`
trains a small SAE with 1, 2 and 4 real processes that share four simulated devices, one after the other, and
compares the processor time of a step. Results go to benchmarks/results/pods.json, the tables to
benchmarks/pods.md; what is not run again keeps its last results.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import describe

__all__ = ["least", "main", "render"]

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results" / "pods.json"
PAGE = REPOSITORY / "benchmarks" / "pods.md"
CHIPS_OF_HOST = 4
CONFIG: dict[str, Any] = {
    "sae": {"variant": "topk", "d_in": 512, "n_latents": 16384, "k": 32},
    "data": {"kind": "toy"},
    "train": {"batch_size": 16384, "tokens": 16384 * 10_000, "aux_k": 0},
}
SLICES: dict[str, list[dict[str, int]]] = {
    "v5e:2x4": [{"data": 8, "latents": 1}, {"data": 2, "latents": 4}, {"data": 1, "latents": 8}],
    "v5e:8x8": [{"data": 64, "latents": 1}, {"data": 8, "latents": 8}, {"data": 1, "latents": 64}],
    "v5e:16x16": [{"data": 256, "latents": 1}, {"data": 16, "latents": 16}, {"data": 1, "latents": 256}],
}


def least(
    sizes: Mapping[str, int], *, batch: int, width: int, parameters: int, state: int
) -> dict[str, float]:
    """The least bytes of a step on each host.

    Read: every row once, by one host. Exchanged, as results on each chip: of several parts of a batch the sum
    of the gradients of the chip's parameters, and of several parts of the latents the sum of its tokens'
    reconstructions and one number a token that says which codes are among the k largest. Kept: the state once
    over all chips, and the chip's tokens. All are float32.

    Args:
        sizes: axes `data` and `latents` of the mesh.
        batch: tokens of a step.
        width: width of the activations.
        parameters: number of parameters.
        state: bytes of the state.
    """
    chips, hosts = sizes["data"] * sizes["latents"], sizes["data"] * sizes["latents"] / CHIPS_OF_HOST
    tokens = batch / sizes["data"]
    gradients = 4 * parameters / sizes["latents"] if sizes["data"] > 1 else 0
    sums = 4 * tokens * (width + 1) if sizes["latents"] > 1 else 0
    return {
        "read": 4 * batch * width / hosts,
        "exchanged": CHIPS_OF_HOST * (gradients + sums),
        "kept": CHIPS_OF_HOST * (state / chips + 4 * tokens * width),
    }


def on_paper(results: dict[str, Any]) -> None:
    """Compiles the step for each slice and mesh that has no result yet, and writes each down at once."""
    from mergelab.sae.training.aot import plan_step
    from mergelab.sae.training.config import load_config

    found: dict[str, Any] = results.setdefault("paper", {})
    config = load_config(CONFIG)
    batch, width = config.train.batch_size, CONFIG["sae"]["d_in"]
    for topology, meshes in SLICES.items():
        for sizes in meshes:
            name = f"{topology} data={sizes['data']},latents={sizes['latents']}"
            if name in found:
                continue
            plan = plan_step(config, topology, sizes)
            hosts = plan.report.chips / CHIPS_OF_HOST
            found[name] = {
                "mesh": sizes,
                "topology": topology,
                "read": 4 * batch * width / hosts,  # `batch_part`, and rows handed on among hosts of a group
                "exchanged": CHIPS_OF_HOST * sum(c.nbytes for c in plan.report.collectives),
                "kept": CHIPS_OF_HOST * (plan.report.peak - plan.report.temporaries),
                "temporaries": CHIPS_OF_HOST * plan.report.temporaries,
                "collectives": {c.kind: [c.count, c.nbytes] for c in plan.report.collectives},
                "bound_ms": 1000 * plan.bound.seconds,
                "least": least(sizes, batch=batch, width=width, parameters=plan.parameters, state=plan.state),
            }
            _save(results)
            print(name, json.dumps(found[name]), flush=True)


def by_processes(results: dict[str, Any], work: Path, turns: int) -> None:
    """Trains with 1, 2 and 4 processes in turn; paired ratios of the processor time of a step."""
    seconds: dict[str, list[float]] = {"1": [], "2": [], "4": []}
    for turn in range(turns):
        for count in (1, 2, 4):
            seconds[str(count)].append(_one_run(count, work / f"{turn}-{count}"))
            print(turn, count, seconds[str(count)][-1], flush=True)
    ratios = {
        count: statistics.median(many / alone for many, alone in zip(runs, seconds["1"], strict=True))
        for count, runs in seconds.items()
    }
    results["processes"] = {
        "cpu_ms_a_step": {count: [1000 * s for s in runs] for count, runs in seconds.items()},
        "ratio": ratios,
        "machine": describe(work),
    }
    _save(results)


def _one_run(count: int, folder: Path) -> float:
    """Processor seconds of a step, over all processes of one run."""
    folder.mkdir(parents=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.pods_worker", str(port), str(count), str(index), str(folder)],
            cwd=REPOSITORY,
            env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
        )
        for index in range(count)
    ]
    try:
        codes = [process.wait(timeout=1800) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(codes):
        raise RuntimeError(f"a process of {count} ended with {codes}")
    return sum(json.loads((folder / f"cpu-{index}.json").read_text()) for index in range(count))


def render(results: Mapping[str, Any]) -> str:
    """The page with both tables."""
    lines = [
        "# What a step moves",
        "",
        "Written by `python -m benchmarks.pods`. On paper: the step of TopK with "
        f"{CONFIG['sae']['n_latents']:,} latents of width {CONFIG['sae']['d_in']} and "
        f"{CONFIG['train']['batch_size']:,} tokens, without AuxK, compiled for slices of v5e. Bytes are those "
        "of one host of four chips and one step; what is read is by the layout, each row once; exchanged bytes "
        "are the results of exchanges on its chips, as the compiled program lists them, those inside a loop "
        "once. The factor is that over the least that any program of this mesh must read, exchange, or keep "
        "(`benchmarks.pods.least`; for what is kept: with the state divided over all chips).",
        "",
        "| slice | mesh | read | exchanged | kept | temporaries | bound |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for case in results.get("paper", {}).values():
        floor = case["least"]
        cells = [_against(case[name], floor[name]) for name in ("read", "exchanged", "kept")]
        mesh = f"data={case['mesh']['data']}, latents={case['mesh']['latents']}"
        lines.append(
            f"| {case['topology']} | {mesh} | {' | '.join(cells)} | {case['temporaries'] / 1e6:,.1f} MB | "
            f"{case['bound_ms']:.3g} ms |"
        )
    if measured := results.get("processes"):
        lines += [
            "",
            "Measured: a small SAE on `{data: 4}`, four simulated devices shared by 1, 2 and 4 processes on "
            "one machine, in turns; processor time of a step over all processes, and the median of its ratio "
            "to one process of the same turn.",
            "",
            "| processes | ms a step | x one process |",
            "|---:|---:|---:|",
            *(
                f"| {count} | {statistics.median(runs):.1f} | {measured['ratio'][count]:.2f} |"
                for count, runs in measured["cpu_ms_a_step"].items()
            ),
            "",
            f"Turns: {len(measured['cpu_ms_a_step']['1'])}. Machine: "
            + ", ".join(f"{name} {value}" for name, value in measured["machine"].items())
            + ".",
        ]
    return "\n".join(lines) + "\n"


def _against(found: float, floor: float) -> str:
    factor = f" ({found / floor:.2f} x)" if floor else ""
    return f"{found / 1e6:,.1f} MB{factor}"


def _save(results: Mapping[str, Any]) -> None:
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    PAGE.write_text(render(results), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the parts that the command line asks for; returns all results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--paper", action="store_true", help="Compiled programs.")
    parser.add_argument("--again", action="store_true", help="Compile what has a result, too.")
    parser.add_argument("--processes", action="store_true", help="Real processes.")
    parser.add_argument("--turns", type=int, default=3, help="Number of turns of the processes.")
    parser.add_argument("--work", type=Path, help="Folder for runs (default: a temporary one).")
    options = parser.parse_args(arguments)
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if options.paper:
        if options.again:
            results.pop("paper", None)
        on_paper(results)
    if options.processes:
        with tempfile.TemporaryDirectory() as folder:
            by_processes(results, options.work or Path(folder), options.turns)
    _save(results)
    return results


if __name__ == "__main__":
    main()
