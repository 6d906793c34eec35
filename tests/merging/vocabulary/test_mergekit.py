"""The merged vocabulary and its rows are mergekit's, on recorded outputs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from mergelab.checkpoints.folder import open_checkpoint
from mergelab.merging.recipe.schema import TokenizerSpec
from mergelab.merging.vocabulary import VocabularyPlan, plan_vocabulary
from tests.goldens.recording import read as read_recording
from tests.merging.vocabulary.record_mergekit import (
    CASES,
    COLUMNS,
    DATA,
    TENSORS,
    record,
    rows_of_interest,
    write_extended,
)

TOLERANCE = 5e-7


def plan_recipe(recipe: dict[str, Any], folders: dict[str, Path]) -> VocabularyPlan:
    """Plans a recipe whose models are in these folders."""
    tokenizer = recipe.get("tokenizer") or {"source": recipe["tokenizer_source"]}
    spec = TokenizerSpec.model_validate(tokenizer)
    merged = [entry["model"] for entry in recipe["models"]]
    base = recipe.get("base_model")
    merged += [base] if base and base not in merged else []
    lenders = [spec.source] if spec.source in folders and spec.source not in merged else []
    models = {name: open_checkpoint(folders[name]) for name in (*merged, *lenders)}
    return plan_vocabulary(spec, models, base, inputs=merged)


def average(plan: VocabularyPlan, recipe: dict[str, Any], tensor: str, read: Any) -> np.ndarray:
    """The linear merge of one tensor over the plan's sources."""
    weights = {entry["model"]: entry["parameters"]["weight"] for entry in recipe["models"]}
    default = recipe.get("parameters", {}).get("weight", 0)
    total = sum(
        np.float32(weights.get(name, default)) * read(plan.source(name, plan.models[name].tensors[tensor]))
        for name in plan.rows
    )
    return total / np.float32(sum(weights.get(name, default) for name in plan.rows))


def vocabulary_of(tokenizer: dict[str, Any]) -> dict[str, int]:
    return {**tokenizer["model"]["vocab"], **{t["content"]: t["id"] for t in tokenizer["added_tokens"]}}


@pytest.mark.parametrize("case", ["tok_union", "tok_model_source", "tok_union_perm"])
def test_golden_recipes(case: str, goldens: Path, read: Any) -> None:
    folder = goldens / "recipes" / case
    recipe = yaml.safe_load((folder / "config.yaml").read_text())
    names = {f"models/{p.name}": p for p in (goldens / "models").iterdir()}
    plan = plan_recipe(recipe, names)

    expected = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    ours = json.loads(plan.files["tokenizer.json"])
    assert ours["added_tokens"] == expected["added_tokens"]
    assert ours["model"] == expected["model"]
    config = json.loads((folder / "config.json").read_text())
    assert {key: config[key] for key in plan.config_updates} == plan.config_updates

    merged = read_recording(goldens, case).tensors
    for tensor in TENSORS:
        found, expected = average(plan, recipe, tensor, read), merged[tensor]
        np.testing.assert_allclose(expected.at(found), expected.entries, rtol=0, atol=TOLERANCE)
        swapped = np.concatenate([found[1:2], found[:1], found[2:]])
        assert np.abs(expected.at(swapped) - expected.entries).max() > 1000 * TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_recorded_rules(case: str, small_goldens: Path, tmp_path: Path, read: Any) -> None:
    write_extended(small_goldens, tmp_path / "extended")
    models = small_goldens / "models"
    folders = {p.name: p for p in models.iterdir()} | {"extended": tmp_path / "extended"}
    plan = plan_recipe(CASES[case], folders)

    facts = json.loads((DATA / "mergekit.json").read_text())[case]
    tokenizer = json.loads(plan.files["tokenizer.json"])
    ids = vocabulary_of(tokenizer)
    assert ids == dict(plan.vocabulary)
    assert sorted(token for token, number in ids.items() if number >= 512) == facts["new"]
    assert sorted(ids.values()) == list(range(len(ids)))
    assert sorted(t["content"] for t in tokenizer["added_tokens"] if t["special"]) == facts["special"]
    assert plan.size == plan.config_updates["vocab_size"] == facts["vocab_size"]

    recorded = load_file(DATA / "mergekit.safetensors")
    for tensor in TENSORS:
        found = average(plan, CASES[case], tensor, read)[rows_of_interest(ids, plan.size), :COLUMNS]
        expected = recorded[f"{case}.{tensor}"]
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
        assert np.abs(found[::-1] - expected).max() > 1000 * TOLERANCE


@pytest.mark.peers
def test_mergekit_still_gives_what_was_recorded(small_goldens: Path) -> None:
    program = os.environ.get("MERGEKIT_YAML") or shutil.which("mergekit-yaml")
    assert program, "no mergekit-yaml on PATH: set MERGEKIT_YAML to the one of mergekit 0.1.5"
    facts, arrays = record(small_goldens, program)
    assert facts == json.loads((DATA / "mergekit.json").read_text())
    recorded = load_file(DATA / "mergekit.safetensors")
    assert arrays.keys() == recorded.keys()
    for name, array in arrays.items():
        assert array.tobytes() == recorded[name].tobytes()
