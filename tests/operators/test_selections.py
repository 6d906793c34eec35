"""MagMax, consensus and EMR: entries chosen by magnitude or by tasks' masks, against formulas in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from mergelab import operators as ops
from mergelab.errors import OperatorError, RecipeError
from mergelab.merging import Recipe, merge
from tests.merging.recipes import write_model
from tests.merging.streaming.test_stream_jobs import jobs_for, streamed

SHAPES = {"a": (6, 8), "b": (6, 8), "c": (48,)}
RNG = np.random.default_rng(0)
DELTAS = [{k: RNG.standard_normal(s).astype(np.float32) for k, s in SHAPES.items()} for _ in range(3)]
BASE = {k: np.zeros(s, np.float32) for k, s in SHAPES.items()}


def test_equal_magnitudes_are_the_later_models() -> None:
    models = [
        {"t": np.array([1, -2, 3], np.float32)},
        {"t": np.array([-1, 2, 1], np.float32)},
        {"t": np.array([0, -2, -3], np.float32)},
    ]
    found = ops.magmax(lambda_=1)(models, {"t": np.zeros(3, np.float32)})
    np.testing.assert_array_equal(found["t"], [-1, -2, -3])


def test_consensus_keeps_what_enough_tasks_rely_on() -> None:
    models = [{"t": np.array([3, 1, 2, 0], np.float32)}, {"t": np.array([0.1, 1, 2, 0], np.float32)}]
    base = {"t": np.zeros(4, np.float32)}
    for agree, kept in ((0, [3.1, 2, 4, 0]), (1, [3.1, 2, 4, 0]), (2, [0, 2, 4, 0])):
        found = ops.consensus(agree=agree, mask_lambda=0.5)(models, base)["t"]
        np.testing.assert_allclose(found, kept, rtol=1e-6)
    with pytest.raises(OperatorError, match="'agree' is 3 for 2 model"):
        ops.consensus(agree=3)(models, base)


def elect_mask_rescale(deltas: list[dict[str, np.ndarray]], task: int | None) -> dict[str, np.ndarray]:
    """The authors' algorithm, which adds up tensors' means: the paper's where tensors are of one size."""
    keys = deltas[0].keys()
    signs = {k: np.where(np.mean([d[k].astype(float) for d in deltas], axis=0) > 0, 1, -1) for k in keys}
    unified = {
        k: signs[k] * np.max([np.where(d[k] * signs[k] > 0, np.abs(d[k]), 0) for d in deltas], axis=0)
        for k in keys
    }
    if task is None:
        return unified
    masked = {k: unified[k] * (deltas[task][k] * signs[k] > 0) for k in keys}
    size = sum(np.abs(deltas[task][k]).mean() for k in keys)
    return {k: v * size / sum(np.abs(m).mean() for m in masked.values()) for k, v in masked.items()}


@pytest.mark.parametrize("task", [None, 0, 2])
def test_emr_makes_the_authors_models_in_memory_and_streamed(task: int | None) -> None:
    made = ops.emr(task=task)
    expected = elect_mask_rescale(DELTAS, task)
    found = made(DELTAS, BASE)
    written = streamed(jobs_for(made, DELTAS, BASE), threads=2)
    for key in SHAPES:
        np.testing.assert_allclose(found[key], expected[key], rtol=2e-6)
        np.testing.assert_allclose(written[key], expected[key], rtol=2e-6)
    other = elect_mask_rescale(DELTAS, 1)
    assert np.abs(np.asarray(found["a"]) - other["a"]).max() > 0.1


def test_a_recipe_names_the_task_of_emr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, tree in zip(("base", "math", "code"), (BASE, *DELTAS[:2]), strict=True):
        write_model(tmp_path / "models" / folder, {f"model.layers.0.{k}.weight": v for k, v in tree.items()})
    fields: dict[str, Any] = {
        "merge_method": "emr",
        "base_model": "models/base",
        "models": [{"model": "models/math"}, {"model": "models/code"}],
    }
    for task, position in (("code", 1), ("models/math", 0), (1, 1)):
        merge(Recipe(parameters={"task": task}, **fields), f"out{position}", overwrite=True)
        found = load_file(tmp_path / f"out{position}" / "model.safetensors")
        for key, expected in elect_mask_rescale(DELTAS[:2], position).items():
            np.testing.assert_allclose(found[f"model.layers.0.{key}.weight"], expected, rtol=2e-6)
    with pytest.raises(RecipeError, match=r"'poetry' names none.*models/math, models/code"):
        merge(Recipe(parameters={"task": "poetry"}, **fields), "none")
    with pytest.raises(OperatorError, match="'task' is 3 for 3 model"):
        ops.emr(task=3)(DELTAS, BASE)
