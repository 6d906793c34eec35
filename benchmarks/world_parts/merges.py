"""Merges of SmolLM2-135M-Instruct and three siblings, beside mergekit 0.1.5, in one run.

The siblings are made, not trained: every tensor of the real weights plus seeded normal noise of 2 % of the
tensor's root mean square. They show mechanics and speed on a real checkpoint, not what merging does for
quality. Needs the extra `smollm`; mergekit comes into an environment of its own.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import yaml
from safetensors.numpy import load_file, save_file

from benchmarks.cases import CASES, Case
from benchmarks.process import measure as time_process
from benchmarks.world_parts.environments import interpreter, make
from benchmarks.world_parts.section import Place, Section
from tests.smollm import smollm_file

__all__ = ["compare", "make_siblings", "measure"]

REPOSITORY = Path(__file__).parents[2]
MERGEKIT = (["torch==2.13.0"], ["mergekit==0.1.5"])
NOISE = 0.02
RANDOM = ("dare_ties", "della")
"""Methods that draw which changes they drop: two programs draw differently."""
METHODS = (
    "linear",
    "slerp",
    "task_arithmetic",
    "ties",
    "breadcrumbs",
    "model_stock",
    "karcher",
    "multislerp",
    *RANDOM,
)


def measure(place: Place) -> Section:
    """Seconds of whole processes by method, and how far apart the outputs are."""
    base, siblings = place.work / "base", ("first", "second", "third")
    command = [
        sys.executable,
        "-m",
        "mergelab",
        "convert",
        str(smollm_file()),
        str(base),
        "--dtype",
        "float32",
    ]
    time_process(command, cwd=place.work, env=_environment())
    make_siblings(base, [place.work / name for name in siblings])
    programs = make(place.environments / "mergekit", interpreter("3.11"), MERGEKIT)
    cases = {name: CASES[name] for name in METHODS}
    # Where nothing is dropped, nothing is drawn: the rest of the method can be compared.
    undropped = replace(CASES["dare_ties"], per_model={**CASES["dare_ties"].per_model, "density": 1.0})
    cases["dare_ties, density 1"] = undropped
    rows = [_row(name, case, place, programs) for name, case in cases.items()]
    note = (
        "SmolLM2-135M-Instruct in float32 and three siblings of it, which are not trained: its weights "
        f"plus seeded normal noise of {NOISE:.0%} of each tensor's root mean square. This shows mechanics "
        "and speed on a real checkpoint, not quality. Whole processes, start-up included, medians of "
        f"{place.turns} turns in one run. The difference is the largest of any weight between the two "
        "outputs, then as a fraction of the merge's largest change to the base; methods that draw at random "
        "are not compared. Checked apart from this run: ties differ in 138 of 134,515,008 weights, whose "
        "changes are exactly as large as the smallest that is kept, so that either may be (breadcrumbs cut "
        "in the same way); in multislerp, a float64 evaluation of the formula is 2e-7 from mergelab's "
        "embeddings and 7e-3 from mergekit's, whose float32 sums run over 28 million values."
    )
    head = ("merge", "mergelab s", "mergekit s", "mergekit / mergelab", "largest difference", "of the change")
    return Section(note, head, rows)


def make_siblings(base: Path, folders: Sequence[Path]) -> None:
    """Copies of a folder whose tensors are moved by noise, each with a seed of its own."""
    weights = load_file(base / "model.safetensors")
    for seed, folder in enumerate(folders):
        draw = np.random.default_rng(seed)
        shutil.copytree(base, folder, ignore=shutil.ignore_patterns("model.safetensors"))
        moved = {}
        for name in sorted(weights):
            value = weights[name]
            size = np.float32(NOISE * np.sqrt(np.mean(np.square(value, dtype=np.float64))))
            moved[name] = value + size * draw.standard_normal(value.shape, np.float32)
        save_file(moved, folder / "model.safetensors", {"format": "pt"})


def _row(name: str, case: Case, place: Place, programs: Path) -> Sequence[str]:
    recipe = place.work / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(case.recipe() | {"dtype": "float32"}, sort_keys=False))
    ours, theirs = place.work / "mergelab.out", place.work / "mergekit.out"
    own = _environment()
    other = {key: value for key, value in own.items() if key != "PYTHONPATH"}
    # Its model card asks a server about every model name, and fails without one.
    asked = [str(programs / "mergekit-yaml"), str(recipe), str(theirs), "--quiet", "--no-write-model-card"]
    pairs: list[tuple[float, float]] = []
    for _ in range(place.turns):
        for folder in (ours, theirs):
            shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, "-m", "mergelab", "merge", str(recipe), "--out", str(ours), "--json"]
        mine = time_process(command, cwd=place.work, env=own).seconds
        pairs.append((mine, time_process(asked, cwd=place.work, env=other).seconds))
    a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(theirs / mine for mine, theirs in pairs)
    apart = ("drawn at random", "-")
    if name not in RANDOM:
        difference, change = compare(*(_weights(folder) for folder in (ours, theirs, place.work / "base")))
        apart = (f"{difference:.1e}", f"{difference / change:.1e}")
    return (name, f"{a:.1f}", f"{b:.1f}", f"{ratio:.1f}", *apart)


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}


def _weights(folder: Path) -> dict[str, np.ndarray]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def compare(
    ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray]
) -> tuple[float, float]:
    """The largest absolute difference of two merges, and the second merge's largest change of the base.

    Raises:
        RuntimeError: they hold other tensors.
    """
    if ours.keys() != theirs.keys():
        raise RuntimeError(f"only one of the two merges holds {sorted(ours.keys() ^ theirs.keys())[:5]}")
    pairs = [(ours[name], theirs[name], base[name]) for name in ours]
    difference = max(float(np.abs(mine - other).max()) for mine, other, _ in pairs)
    return difference, max(float(np.abs(other - start).max()) for _, other, start in pairs)
