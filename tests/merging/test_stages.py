"""A recipe's stages: each is planned once, and its result is put into the plans that wait for it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergelab.checkpoints import open_checkpoint
from mergelab.errors import CheckpointError, RecipeError
from mergelab.merging import MergeOptions, merge, parse_recipe, plan_merge
from mergelab.merging.engine.job import Job
from mergelab.merging.plan import input_models, planner
from mergelab.merging.plan.input_models import PlannedTensor, with_results
from mergelab.merging.structure.layer_parts import LayerParts
from tests.merging.recipes import write_model
from tests.merging.streaming.test_stream_jobs import ArraySource
from tests.merging.vocabulary.conftest import tokenizer_json

LINEAR = "merge_method: linear\nparameters: {weight: 1}\n"
THREE = f"""name: first
{LINEAR}models: [{{model: a}}, {{model: b}}]
---
name: second
{LINEAR}models: [{{model: first}}, {{model: b}}]
---
{LINEAR}models: [{{model: second}}, {{model: first}}, {{model: a}}]
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        write_model(tmp_path / name, seed=seed, rows=6 + seed)
        tokens = tokenizer_json("BPE", [*"uvwxyz", *(["ab"] * seed)], {})
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(tokens))
    return tmp_path


def test_each_stage_and_checkpoint_is_planned_once(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(models / "b", seed=1)
    planned, opened = Counter[str | None](), Counter[str]()
    plan, opening = planner._plan, input_models.open_checkpoint

    def counted_plan(recipe: Any, *given: Any, **options: Any) -> Any:
        planned[recipe.name] += 1
        return plan(recipe, *given, **options)

    def counted_opening(path: Path) -> Any:
        opened[Path(path).name] += 1
        return opening(path)

    monkeypatch.setattr(planner, "_plan", counted_plan)
    monkeypatch.setattr(input_models, "open_checkpoint", counted_opening)
    merge(parse_recipe(THREE), "out")
    assert planned == {"first": 1, "second": 1, None: 1}
    assert opened == {"a": 2, "b": 2}, "once by each recipe that names it"


@pytest.mark.parametrize(
    ("more", "options"),
    [("tokenizer_source: union\n", {}), ("", {"truncate_embeddings": True})],
    ids=["re-ordered rows", "cut rows"],
)
def test_results_reach_the_tensors_that_are_views_of_them(models: Path, more: str, options: Any) -> None:
    text = (
        f"name: first\n{LINEAR}models: [{{model: b}}]\n---\n{LINEAR}{more}models: [{{model: a}}, "
        "{model: first}]\n"
    )
    recipe = parse_recipe(text)
    merge(recipe, "out", **options)
    merge(recipe.merges[0], "first")
    merge(recipe.model_copy(update={"merges": ()}), "by-hand", **options)
    found = open_checkpoint(models / "out").tensors["model.embed_tokens.weight"]
    assert found.shape[0] == (7 if more else 6)
    assert (models / "out" / "model.safetensors").read_bytes() == (
        models / "by-hand" / "model.safetensors"
    ).read_bytes()


def test_the_parts_of_a_tensor_are_taken_from_a_result() -> None:
    made = ArraySource("w", np.arange(8, dtype=np.float32).reshape(4, 2))
    waiting = LayerParts(((PlannedTensor("first", "w", (4, 2), np.dtype(np.float32)), 1),) * 2, 2, 0)
    out = np.empty(8, np.float32)
    with pytest.raises(CheckpointError, match="has not run yet"):
        waiting.read_into(0, out)
    with_results(waiting, {"first": {"w": made}}).read_into(0, out)
    np.testing.assert_array_equal(out, [4, 5, 6, 7] * 2)
    untouched = Job("w", (4, 2), made.dtype, (made,))
    assert with_results(untouched.sources[0], {"first": {}}) is made


def test_a_plan_runs_as_often_as_one_likes_and_keeps_its_own_options(models: Path) -> None:
    write_model(models / "b", seed=1)
    plan = plan_merge(parse_recipe(THREE), seed=4)
    once = merge(plan, "once", MergeOptions(memory=10**8, threads=1))
    again = merge(plan, "again", MergeOptions(memory=10**8), threads=2)
    assert once.plan.seed == again.plan.seed == 4
    assert (models / "once" / "mergelab.json").read_bytes() == (
        models / "again" / "mergelab.json"
    ).read_bytes()
    with pytest.raises(RecipeError, match="plan was made before seed and dtype could be heeded"):
        merge(plan, "third", seed=5, dtype="bfloat16")
    with pytest.raises(TypeError, match="sede"):
        merge(plan, "third", sede=5)


def test_a_plan_describes_itself_as_plain_data(models: Path) -> None:
    write_model(models / "b", seed=1)
    summary = plan_merge(parse_recipe(THREE)).summary(10**9, models / "new" / "out")
    assert json.loads(json.dumps(summary)) == summary
    assert summary["stages"].keys() == {"first", "second"}
    assert summary["disk_needed"] == 3 * summary["bytes_out"]
    assert summary["models"] == ["second", "first", "a"]
