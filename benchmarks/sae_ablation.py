"""What each piece of the recipe buys: trainings on toy ground truth, each with one piece switched off.

    python -m benchmarks.sae_ablation --work DIR [--seeds 2] [--publish]

Results are kept in DIR after every training, so that a run that was stopped goes on where it stood.
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
from benchmarks.sae_presets import PRESETS
from benchmarks.sae_quality import judge
from benchmarks.sae_step import REPOSITORY
from benchmarks.table import replace_section
from mergelab.sae.training.config import TrainingRecipe
from mergelab.sae.training.finish import finished_sae
from mergelab.sae.training.initialize import initialize
from mergelab.sae.training.step import make_step
from mergelab.sae.variants import make_variant

__all__ = ["WITHOUT", "main", "render"]

RESULTS = REPOSITORY / "benchmarks" / "results" / "sae_ablation.json"

WITHOUT: Mapping[str, Mapping[str, Any]] = {
    "the defaults": {},
    "no lift (AuxK alone, as in the paper)": {"bias_boost": 0.0},
    "neither lift nor AuxK": {"bias_boost": 0.0, "aux_k": 0},
    "no AuxK (lift alone)": {"aux_k": 0},
    "paper's learning rate, constant": {"learning_rate": 2e-4 / (2048 / 2**14) ** 0.5, "decay": 0.0},
    "encoder's rows at the decoder's rate": {"encoder_rate": 1.0},
    "encoder's bias at the decoder's rate": {"bias_rate": 1.0},
    "squares averaged over 1000 steps": {"b2": 0.999},
    "no decay": {"decay": 0.0},
    "no warm-up": {"warmup": 0.0},
    "no average": {"ema": 0.0},
    "average over 1000 steps": {"ema": 0.999},
    "encoder started as the transpose itself": {"initial_scale": 1.0},
    "encoder not started as the transpose": {"tie_initial": False},
    "b_pre started at 0": {"center": False},
    "gradients not projected": {"project_gradients": False},
    "decoder not renormalized": {"unit_decoder": False, "project_gradients": False},
    "inputs not scaled": {"normalize": "none"},
}
"""Settings that differ from the defaults, by what the table calls them."""

_FIGURES = ("nmse", "dead", "mean_max_cosine", "above")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark as the command line asks; returns what it found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sae_ablation")
    parser.add_argument("--work", type=Path, required=True, help="folder for results")
    parser.add_argument("--preset", choices=PRESETS, default="reference")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--publish", action="store_true", help="write the table of benchmarks/README.md")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    file = options.work / f"sae_ablation_{options.preset}.json"
    results: dict[str, Any] = {"machine": describe(options.work), "preset": options.preset, "runs": {}}
    if file.is_file():
        results = json.loads(file.read_text())
    for seed in range(options.seeds):
        for name, changes in WITHOUT.items():
            runs = results["runs"].setdefault(name, [])
            if len(runs) <= seed:
                runs.append(_train(options.preset, seed, changes))
                file.write_text(json.dumps(results, indent=1))
                print(name, seed, json.dumps(runs[-1]), file=sys.stderr)
    print(render(results))
    if options.publish:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        page = REPOSITORY / "benchmarks" / "README.md"
        text = replace_section(page.read_text(encoding="utf-8"), "sae ablation table", render(results))
        page.write_text(text, encoding="utf-8")
    return results


def _train(preset: str, seed: int, changes: Mapping[str, Any]) -> dict[str, float]:
    problem = PRESETS[preset].problem
    truth = replace(PRESETS[preset].truth, seed=seed, rows=problem.steps * problem.batch)
    recipe = TrainingRecipe(steps=problem.steps, batch_size=problem.batch, **changes)
    variant = make_variant("topk", d_in=problem.d, n_latents=problem.n, k=problem.k)
    state = initialize(variant, recipe, jax.random.key(seed), truth.sample(32_768, seed=1))
    step = make_step(variant, recipe)
    started = time.perf_counter()
    for number in range(problem.steps):
        x = jnp.asarray(truth.read(number * problem.batch, (number + 1) * problem.batch))
        state, _ = step(state, x, x)
    found = finished_sae(variant, recipe, state)
    arrays = {name: np.asarray(getattr(found, name)) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    # The judge's convention: b_dec is subtracted before the encoder.
    arrays["b_enc"] = arrays["b_enc"] + arrays["b_dec"] @ arrays["W_enc"]
    return judge(arrays, truth, problem.k) | {"seconds": time.perf_counter() - started}


def render(results: Mapping[str, Any]) -> str:
    """One row for each setting, beside the defaults."""
    head = ["recipe", "NMSE", "dead", "mean max cosine", "> .9"]
    rows = [
        [name, *map(_cell, _FIGURES, zip(*_figures(runs), strict=True))]
        for name, runs in results["runs"].items()
    ]
    preset, seeds = results["preset"], min(map(len, results["runs"].values()))
    p, truth = PRESETS[preset].problem, PRESETS[preset].truth
    machine = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    return "\n".join(
        [
            *(f"| {' | '.join(cells)} |" for cells in (head, ["---", *["---:"] * 4], *rows)),
            "",
            f"The preset `{preset}`: {truth.n_features} features in {truth.d_in} dimensions; {p.n} latents, "
            f"k={p.k}, {p.steps * p.batch:,} activations. Means over {seeds} seeds; dead latents are those "
            f"that never fired on {64 * 1024:,} unseen activations. Machine: {machine}.",
        ]
    )


def _figures(runs: Sequence[Mapping[str, float]]) -> list[list[float]]:
    return [[run[name] for name in _FIGURES] for run in runs]


def _cell(name: str, values: Sequence[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.1%}" if name in ("dead", "above") else f"{mean:.4f}" if name == "nmse" else f"{mean:.3f}"


if __name__ == "__main__":
    main()
