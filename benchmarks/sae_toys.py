"""SAEs on toy truths that played no part in choosing the defaults: writes sae_toys.md.

    python -m benchmarks.sae_toys --work DIR [--seeds 3] [--rates] [--publish]

The defaults, and settings that are off by default and were found to help on other truths, on the same rows in
the same order. With `--rates` the defaults at eight learning rates, at the first seed. The result of every
training is kept in DIR, so that a run that was stopped goes on where it stood; the page says how many seeds a
row has.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.machine import describe
from benchmarks.sae_peers.problem import Problem
from benchmarks.sae_presets import Preset
from benchmarks.sae_quality import judge
from benchmarks.sae_step import REPOSITORY
from mergelab.sae.toy import ToyGroundTruth
from mergelab.sae.training.config import TrainingRecipe
from mergelab.sae.training.finish import finished_sae
from mergelab.sae.training.initialize import SAMPLE_ROWS, initialize
from mergelab.sae.training.step import make_step
from mergelab.sae.training.update import automatic_learning_rate
from mergelab.sae.variants import make_variant

__all__ = ["FACTORS", "SETTINGS", "TOYS", "main", "page"]

RESULTS = REPOSITORY / "benchmarks" / "results" / "sae_toys.json"
PAGE = REPOSITORY / "benchmarks" / "sae_toys.md"

TOYS: Mapping[str, Preset] = {
    "plain": Preset(
        ToyGroundTruth(d_in=64, n_features=384, l0=6.0, exponent=0.5),
        Problem(d=64, n=768, k=12, batch=512, steps=2000),
        {"nmse": 1.02, "dead": 0.001, "mean_max_cosine": 0.98},
    ),
    "far from the origin": Preset(
        ToyGroundTruth(d_in=80, n_features=512, l0=5.0, exponent=0.9, mean_norm=3.0),
        Problem(d=80, n=1024, k=10, batch=512, steps=2000),
        {"nmse": 1.02, "dead": 0.001, "mean_max_cosine": 0.98},
    ),
    "in groups": Preset(
        ToyGroundTruth(d_in=48, n_features=256, l0=4.0, exponent=0.7, group_size=4, lift=6.0),
        Problem(d=48, n=512, k=8, batch=512, steps=2000),
        {"nmse": 1.02, "dead": 0.001, "mean_max_cosine": 0.98},
    ),
}
"""Truths, and what the defaults are held to; `nmse` over the least of the eight rates."""

SETTINGS: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "the defaults": ({}, {}),
    "lift that does not fade (`train.lift_floor` 0.2)": ({"boost_floor": 0.2}, {}),
    "late loss at k/2 (`half_weight` 0.25 from `half_from` 0.5)": ({}, {"half_weight": 0.25}),
    "both": ({"boost_floor": 0.2}, {"half_weight": 0.25}),
}
"""What is changed of the recipe and of the variant."""

FACTORS = (0.25, 0.5, 0.71, 1.0, 1.41, 2.0, 2.83, 4.0)
"""Multiples of the automatic learning rate."""

_DEFAULTS = next(iter(SETTINGS))
_JUDGED_ON = 131_072
_FIGURES = ("nmse", "dead", "mean_max_cosine", "above")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark as the command line asks; returns what it found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sae_toys")
    parser.add_argument("--work", type=Path, required=True, help="folder for results")
    parser.add_argument("--toys", nargs="+", choices=TOYS, default=list(TOYS), help="truths")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--steps", type=int, help="steps of each training, for a trial")
    parser.add_argument("--rates", action="store_true", help="the defaults at eight rates too")
    parser.add_argument("--publish", action="store_true", help="write benchmarks/sae_toys.md")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    file = options.work / "sae_toys.json"
    results: dict[str, Any] = {"machine": describe(options.work), "runs": {}}
    if file.is_file():
        results = json.loads(file.read_text())
    asked = []
    for seed in range(options.seeds):
        asked += [(toy, seed, name, 1.0) for toy in options.toys for name in SETTINGS]
        if options.rates and seed == 0:
            asked += [(toy, 0, _DEFAULTS, factor) for toy in options.toys for factor in FACTORS]
    rows: tuple[ToyGroundTruth | None, np.ndarray] = (None, np.empty(0))
    for toy, seed, name, factor in asked:
        key = f"{toy}|{seed}|{name}|{factor:g}"
        if key in results["runs"]:
            continue
        problem = TOYS[toy].problem
        problem = replace(problem, steps=options.steps or problem.steps)
        truth = replace(TOYS[toy].truth, seed=seed, rows=problem.steps * problem.batch)
        if truth != rows[0]:
            rows = truth, truth.read(0, truth.rows)
        results["runs"][key] = _train(truth, problem, rows[1], name, factor)
        file.write_text(json.dumps(results, indent=1))
        print(key, json.dumps(results["runs"][key]), file=sys.stderr)
    print(page(results))
    if options.publish:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        PAGE.write_text(page(results), encoding="utf-8")
    return results


def _train(
    truth: ToyGroundTruth, problem: Problem, rows: np.ndarray, name: str, factor: float
) -> dict[str, float]:
    began = time.process_time()
    of_recipe, of_variant = SETTINGS[name]
    rate = factor * automatic_learning_rate(problem.n, problem.steps)
    recipe = TrainingRecipe(problem.steps, problem.batch, learning_rate=rate, **of_recipe)
    variant = make_variant("topk", d_in=problem.d, n_latents=problem.n, k=problem.k, **of_variant)
    state = initialize(variant, recipe, jax.random.key(truth.seed), rows[:SAMPLE_ROWS])
    step = make_step(variant, recipe)
    for start in range(0, problem.steps * problem.batch, problem.batch):
        x = jnp.asarray(rows[start : start + problem.batch])
        state, _ = step(state, x, x)
    found = finished_sae(variant, recipe, state)
    arrays = {name: np.asarray(getattr(found, name)) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    # The judge's convention: b_dec is subtracted before the encoder.
    arrays["b_enc"] = arrays["b_enc"] + arrays["b_dec"] @ arrays["W_enc"]
    figures = judge(arrays, truth, problem.k, _JUDGED_ON)
    return figures | {"learning_rate": rate, "cpu_seconds": time.process_time() - began}


def page(results: Mapping[str, Any]) -> str:
    """The page: a table for each truth, then the rates."""
    runs: dict[tuple[str, str, float], list[Mapping[str, float]]] = {}
    for key, run in results["runs"].items():
        toy, _, name, factor = key.split("|")
        runs.setdefault((toy, name, float(factor)), []).append(run)
    lines = [
        "# SAEs on toy truths that nothing was tuned on",
        "",
        "Written by `python -m benchmarks.sae_toys --work WORK --rates --publish`. Top-k SAEs, judged on",
        f"{_JUDGED_ON:,} rows that no training saw; **dead** is the fraction of latents never active there.",
        "Means over seeds (of truth, rows and initial parameters), ± their standard deviation. In bold what",
        "misses its aim: dead below 0.1 %, mean max cosine of at least 0.98, and, where rates were compared,",
        "NMSE at the first seed at most 2 % above the least of theirs.",
        "",
    ]
    rates: list[str] = []
    for toy, preset in TOYS.items():
        mine = {name: runs[toy, name, 1.0] for name in SETTINGS if (toy, name, 1.0) in runs}
        rated = {f: runs[toy, _DEFAULTS, f][0]["nmse"] for f in FACTORS if (toy, _DEFAULTS, f) in runs}
        if mine:
            lines += _table(toy, preset, mine, min(rated.values()) if len(rated) == len(FACTORS) else None)
        if len(rated) > 1:
            cells = [f"{rated[f]:.4f}" if f in rated else "" for f in FACTORS]
            rates.append(f"| {toy} | {' | '.join(cells)} |")
    if rates:
        lines += ["NMSE of the defaults at multiples of the automatic rate, at the first seed:", ""]
        lines += [f"| truth | {' | '.join(f'x {f:g}' for f in FACTORS)} |", "| --- |" + " ---: |" * 8]
        lines += [*rates, ""]
    machine = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    lines.append(f"Machine, shared with other work while this ran: {machine}.")
    return "\n".join(lines) + "\n"


def _table(
    toy: str,
    preset: Preset,
    mine: Mapping[str, Sequence[Mapping[str, float]]],
    best: float | None,
) -> list[str]:
    truth, p = preset.truth, preset.problem
    told = f", mean of norm {truth.mean_norm:g}" if truth.mean_norm else ""
    told += f", groups of {truth.group_size}" if truth.group_size > 1 else ""
    rows = []
    for name, found in mine.items():
        cells = [name]
        for figure in _FIGURES:
            values = [run[figure] for run in found]
            cells.append(_cell(figure, values, preset.aims, best))
        seconds = statistics.mean(run["cpu_seconds"] for run in found)
        rows.append([*cells, f"{seconds:.0f}", str(len(found))])
    head = ["setting", "NMSE", "dead", "mean max cosine", "> 0.9", "CPU s", "seeds"]
    return [
        f"**{toy}**: {truth.n_features} features in {truth.d_in} dimensions, {truth.l0:g} on, frequencies "
        f"`i^-{truth.exponent:g}`{told}; {p.n} latents,",
        f"k={p.k}, {p.steps * p.batch:,} rows in batches of {p.batch}.",
        "",
        *(f"| {' | '.join(cells)} |" for cells in (head, ["---", *["---:"] * 6], *rows)),
        "",
    ]


def _cell(figure: str, values: Sequence[float], aims: Mapping[str, float], best: float | None) -> str:
    mean = statistics.mean(values)
    spread = f" ± {statistics.stdev(values):.{4 if figure == 'nmse' else 3}f}" if len(values) > 1 else ""
    if figure in ("dead", "above"):
        text = f"{mean:.2%}" if figure == "dead" else f"{mean:.1%}"
    else:
        text = f"{mean:.4f}{spread}" if figure == "nmse" else f"{mean:.3f}{spread}"
    missed = {
        "nmse": best is not None and values[0] > aims["nmse"] * best,
        "dead": mean >= aims["dead"],
        "mean_max_cosine": mean < aims["mean_max_cosine"],
    }
    return f"**{text}**" if missed.get(figure) else text


if __name__ == "__main__":
    main()
