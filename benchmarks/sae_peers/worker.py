"""Runs one trainer in a process of its own, with whatever environment it needs, on two threads in float32.

    python -m benchmarks.sae_peers.worker '{"do": "time", "trainer": "SAELens", "problem": {...}, ...}'

`time` steps on noise and tells the seconds of each step; `train` steps once through a file of activations and
writes the SAE's arrays; `sweep` does so several times, and writes each SAE in the trainer's own format. All
print one line of JSON, the last of stdout.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.sae_peers.problem import Problem, Trainer, build, decode, encode

__all__ = ["main"]

_BATCHES = 4  # of noise that take turns, so that no trainer sees one batch over and over
_WARM = 2  # steps that are not timed: they compile and allocate
_LEAST = 3  # timed steps, however slow


def main() -> None:
    """Does what the JSON of the first argument says."""
    asked = json.loads(sys.argv[1])
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    problem = Problem(**asked["problem"])
    with contextlib.redirect_stdout(sys.stderr):  # libraries greet
        found = {"time": _time, "train": _train, "sweep": _sweep}[asked["do"]](asked, problem)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({**found, "peak_bytes": peak}))


def _time(asked: dict[str, Any], problem: Problem) -> dict[str, Any]:
    rng = np.random.default_rng(problem.seed)
    batches = [rng.standard_normal((problem.batch, problem.d), np.float32) for _ in range(_BATCHES)]
    trainer = build(asked["trainer"], problem, batches[0])
    trainer.step(batches[0])
    if asked["dead"]:
        trainer.silence(round(asked["dead"] * problem.n))
    seconds: list[float] = []
    until = float("inf")
    count = 0
    while len(seconds) < _LEAST or time.perf_counter() < until:
        count += 1
        started = time.perf_counter()
        trainer.step(batches[count % _BATCHES])
        ended = time.perf_counter()
        if count > _WARM:
            seconds.append(ended - started)
        else:
            until = ended + asked["seconds"]
    return {"seconds": seconds, "gemm_flops": _gemm(asked["trainer"])}


def _train(asked: dict[str, Any], problem: Problem) -> dict[str, Any]:
    trainer, found = _trained(asked, problem)
    np.savez(asked["out"], allow_pickle=False, **trainer.arrays())
    return found


def _sweep(asked: dict[str, Any], problem: Problem) -> dict[str, Any]:
    """Trainings of this problem at multiples of the default rate and seeds, `runs`, each to a folder.

    What is told of each stands beside its folder as soon as it is there, for what is stopped half-way.
    """
    sample = np.load(asked["sample"])
    first = build(asked["trainer"], problem, sample)
    usual = first.learning_rate
    first.step(sample[: problem.batch])  # what compiles is not counted
    for run in asked["runs"]:
        rate = None if run["factor"] == 1 else run["factor"] * usual
        trainer, found = _trained(asked, replace(problem, seed=run["seed"], learning_rate=rate))
        trainer.save(run["folder"])
        Path(run["folder"] + ".json").write_text(json.dumps(found))
    return {}


def _trained(asked: dict[str, Any], problem: Problem) -> tuple[Trainer, dict[str, Any]]:
    rows, sample = np.load(asked["rows"], mmap_mode="r"), np.load(asked["sample"])
    before = time.process_time()
    trainer = build(asked["trainer"], problem, sample)
    started = time.perf_counter()
    for step in range(problem.steps):
        first = step * problem.batch
        trainer.step(np.array(rows[first : first + problem.batch]))
    seconds, cpu = time.perf_counter() - started, time.process_time() - before
    arrays = trainer.arrays()
    x = np.array(rows[:256])
    own, saved = trainer.reconstruct(x), decode(arrays, *encode(arrays, x, problem.k))
    # A near tie for the last place may be decided differently, in a row or two.
    agree = (np.abs(own - saved).max(axis=1) < 1e-3 * np.abs(own).max()).mean()
    if agree < 0.98:
        raise RuntimeError(f"the saved arrays reconstruct {agree:.0%} of the rows as the trainer itself does")
    told = {"train_seconds": seconds, "cpu_seconds": cpu, "learning_rate": trainer.learning_rate}
    return trainer, told


def _gemm(trainer: str, size: int = 2048, turns: int = 8) -> float:
    """FLOP/s of the fastest of some float32 products of square matrices, by the trainer's own library."""
    a = np.random.default_rng(0).standard_normal((size, size), np.float32)
    if trainer == "mergelab":
        import jax

        product, matrix = jax.jit(lambda x: x @ x), jax.device_put(a)

        def run() -> None:
            product(matrix).block_until_ready()
    else:
        import torch  # pyright: ignore[reportMissingImports]

        tensor = torch.from_numpy(a)

        def run() -> None:
            _ = tensor @ tensor

    seconds = []
    for _ in range(turns):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


if __name__ == "__main__":
    main()
