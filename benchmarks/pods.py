"""What a training step reads, exchanges and keeps on a pod, by compiled programs; what processes cost here.

    python -m benchmarks.pods [--paper [--simulated]] [--processes] [--work DIR]

`--paper` compiles the step of `CONFIG` for 8, 64 and 256 chips that are not there (extra: tpu-aot) and
counts what a host of four chips reads, exchanges and keeps, against the least that any program must; with
`--simulated` the compiler of this CPU does it for as many simulated devices: the exchanges, before a
TPU's compiler joins some. `--processes` trains a small SAE with 1, 2 and 4 real processes that share four
simulated devices, one after the other, and compares the processor time of a step. Results go to
benchmarks/results/pods.json, the tables to benchmarks/pods.md; what is not run again keeps its last results.
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
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Devices are simulated where --simulated asks for it; the flag is read once, when JAX starts.
if "--simulated" in sys.argv:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=256"

import jax

from benchmarks.machine import describe
from mergelab.sharding import make_mesh

if TYPE_CHECKING:
    from mergelab.sae.training.config import TrainConfig

__all__ = ["least", "main", "render"]

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results" / "pods.json"
PAGE = REPOSITORY / "benchmarks" / "pods.md"
CHIPS_OF_HOST = 4
Compiled = tuple[dict[str, tuple[int, int]], int]
"""Kind of exchange -> count and bytes of results on a chip; bytes of temporaries."""
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


def on_paper(results: dict[str, Any], compiler: str) -> None:
    """Compiles the step for each slice and mesh that has no result yet, and writes each down at once."""
    from mergelab.sae.training.aot import held_bytes, shapes_of
    from mergelab.sae.training.config import load_config

    config = load_config(CONFIG)
    variant, recipe, shapes = shapes_of(config, None)
    found: dict[str, Any] = results.setdefault("paper", {})
    batch, width = recipe.batch_size, variant.d_in
    parameters = sum(leaf.size for leaf in shapes.params.values())
    for topology, meshes in SLICES.items():
        for sizes in meshes:
            name = f"{topology} data={sizes['data']},latents={sizes['latents']}"
            if name in found:
                continue
            exchanged, temporaries = (_on_slice if compiler == "tpu" else _simulated)(config, topology, sizes)
            held = held_bytes(variant, recipe, shapes, sizes)
            chips = sizes["data"] * sizes["latents"]
            found[name] = {
                "mesh": sizes,
                "topology": topology,
                "compiler": compiler,
                # By the layout: each row is read by one host, and handed on within a group.
                "read": 4 * batch * width * CHIPS_OF_HOST / chips,
                "exchanged": CHIPS_OF_HOST * sum(nbytes for _, nbytes in exchanged.values()),
                "kept": CHIPS_OF_HOST * (held.state + held.batch / 2),  # inputs are their own targets
                "temporaries": CHIPS_OF_HOST * temporaries,
                "collectives": exchanged,
                "least": least(
                    sizes,
                    batch=batch,
                    width=width,
                    parameters=parameters,
                    state=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)),
                ),
            }
            _save(results)
            print(name, json.dumps(found[name]), flush=True)


def _on_slice(config: TrainConfig, topology: str, sizes: Mapping[str, int]) -> Compiled:
    """What the TPU compiler makes of it."""
    from mergelab.sae.training.aot import plan_step

    report = plan_step(config, topology, sizes).report
    return {c.kind: (c.count, c.nbytes) for c in report.collectives}, report.temporaries


def _simulated(config: TrainConfig, topology: str, sizes: Mapping[str, int]) -> Compiled:
    """What the compiler of this CPU makes of it for as many simulated devices."""
    from mergelab.aot.worker import collectives
    from mergelab.sae.training.aot import lower_step, shapes_of

    variant, recipe, _ = shapes_of(config, None)
    request = {"variant": {"name": variant.name, **asdict(variant)}, "recipe": asdict(recipe)}
    compiled = lower_step(make_mesh(sizes), request).compile()
    analysis: Any = compiled.memory_analysis()
    return collectives(compiled.as_text() or ""), analysis.temp_size_in_bytes


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
            # Where all of XLA's threads, one for each core or device, wait in an all-reduce, none is left for
            # a product that some device must still finish: more threads.
            env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "NPROC": "16"},
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
        f"{CONFIG['train']['batch_size']:,} tokens, without AuxK, compiled {_compiler(results)}. Bytes are "
        "those of one host of four chips and one step; what is read is by layout, each row once; exchanged "
        "bytes are the results of exchanges on its chips, as the compiled program lists them, those inside a "
        "loop once. The factor is that over the least that any program of this mesh must read, exchange, or "
        "keep (`benchmarks.pods.least`; for what is kept: with the state divided over all chips).",
        "",
        "| chips | mesh | read | exchanged | kept | temporaries |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for case in results.get("paper", {}).values():
        floor = case["least"]
        cells = [_against(case[name], floor[name]) for name in ("read", "exchanged", "kept")]
        mesh = f"data={case['mesh']['data']}, latents={case['mesh']['latents']}"
        chips = case["mesh"]["data"] * case["mesh"]["latents"]
        lines.append(f"| {chips} | {mesh} | {' | '.join(cells)} | {case['temporaries'] / 1e6:,.1f} MB |")
    if measured := results.get("processes"):
        lines += [
            "",
            "Measured: a small SAE on `{data: 4}`, four simulated devices shared by 1, 2 and 4 processes on "
            "one machine, in turns; processor time of a step over all processes, and the median of its ratio "
            "to one process of the same turn. Processes exchange over loopback by Gloo, whose threads count; "
            "on a pod the chips exchange.",
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


def _compiler(results: Mapping[str, Any]) -> str:
    kinds = {case["compiler"] for case in results.get("paper", {}).values()}
    names = {"tpu": "for slices of v5e", "cpu": "by the compiler of a CPU for simulated devices"}
    return " and ".join(names[kind] for kind in sorted(kinds)) or "nowhere yet"


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
    parser.add_argument("--simulated", action="store_true", help="Simulated devices in place of slices.")
    parser.add_argument("--again", action="store_true", help="Compile what has a result, too.")
    parser.add_argument("--processes", action="store_true", help="Real processes.")
    parser.add_argument("--turns", type=int, default=3, help="Number of turns of the processes.")
    parser.add_argument("--work", type=Path, help="Folder for runs (default: a temporary one).")
    options = parser.parse_args(arguments)
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if options.paper:
        if options.again:
            results.pop("paper", None)
        on_paper(results, "cpu" if options.simulated else "tpu")
    if options.processes:
        with tempfile.TemporaryDirectory() as folder:
            by_processes(results, options.work or Path(folder), options.turns)
    _save(results)
    return results


if __name__ == "__main__":
    main()
