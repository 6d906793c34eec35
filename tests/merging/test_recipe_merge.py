"""The one call: a complete folder, graphs of recipes, interruption and resumption, provenance."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from mergelab.errors import NonFiniteError, OutputError, RecipeError
from mergelab.merging import Recipe, merge, plan_merge
from mergelab.merging.recipe.recipe_file import parse_recipe, recipe_yaml
from tests.merging.recipes import write_model


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "a", rows=50, width=8)
    write_model(tmp_path / "b", rows=50, width=8, seed=1)
    (tmp_path / "a" / "tokenizer_config.json").write_text("{}")
    (tmp_path / "a" / "generation_config.json").write_text('{"eos_token_id": 2}')
    return tmp_path


def linear(*models: str, **fields) -> Recipe:
    return Recipe(
        **(
            {"merge_method": "linear", "models": [{"model": m} for m in models], "parameters": {"weight": 1}}
            | fields
        )
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_output_is_a_complete_folder(models: Path) -> None:
    merged = merge(linear("a", "b"), "out", seed=3, sha256=True)
    files = contents(models / "out")
    assert files.keys() == {
        "README.md",
        "SHA256SUMS",
        "config.json",
        "generation_config.json",
        "mergelab.json",
        "model.safetensors",
        "tokenizer_config.json",
    }
    weights, a, b = (load_file(models / name / "model.safetensors") for name in ("out", "a", "b"))
    for name, value in weights.items():
        np.testing.assert_allclose(value, (a[name] + b[name]) / 2, rtol=1e-6)
    assert json.loads(files["config.json"])["num_hidden_layers"] == 3
    assert files["SHA256SUMS"].decode() == f"{merged.sha256['model.safetensors']}  model.safetensors\n"
    assert merged.seconds_streaming > 0
    assert not list(models.glob(".out*"))


def test_the_card_says_what_was_merged_and_is_valid(models: Path) -> None:
    merged = merge(linear("a", "b", chat_template="chatml"), "out", seed=3)
    card = (models / "out" / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "tags": ["mergelab", "mergekit", "merge", "linear"],
    }
    assert "seed 3" in body
    assert f"```yaml\n{recipe_yaml(merged.plan.recipe).rstrip()}\n```" in body
    for model in merged.plan.models:
        assert f"| `{model.name}` | local | `{model.fingerprint}` |" in body
    record = json.loads((models / "out" / "mergelab.json").read_text())
    assert record["identity"] == merged.plan.identity
    assert record["identity"] in body
    assert record["tensors"].keys() == {job.name for job in merged.plan.jobs}
    assert parse_recipe(record["recipe"]) == merged.plan.recipe
    assert str(models) not in card


def test_shards_have_an_index_and_the_same_tensors(models: Path) -> None:
    merge(linear("a", "b"), "one")
    merge(linear("a", "b"), "many", shard_bytes=1000, threads=1)
    index = json.loads((models / "many" / "model.safetensors.index.json").read_text())
    whole = load_file(models / "one" / "model.safetensors")
    assert index["weight_map"].keys() == whole.keys()
    assert len(set(index["weight_map"].values())) > 2
    for name, file in index["weight_map"].items():
        np.testing.assert_array_equal(load_file(models / "many" / file)[name], whole[name])


GRAPH = """name: first
merge_method: linear
models: [{model: a}, {model: b}]
parameters: {weight: 1}
---
name: second
merge_method: task_arithmetic
base_model: a
models: [{model: first}]
parameters: {weight: 2}
---
merge_method: linear
models: [{model: second, parameters: {weight: 3}}, {model: first, parameters: {weight: 1}}]
"""


def test_a_graph_gives_what_its_merges_give_one_by_one(models: Path) -> None:
    recipe = parse_recipe(GRAPH)
    merge(recipe, "graph")
    first, second = recipe.merges
    merge(first, "first")
    merge(second, "second")
    merge(recipe.model_copy(update={"merges": ()}), "by-hand")
    assert (models / "graph" / "model.safetensors").read_bytes() == (
        models / "by-hand" / "model.safetensors"
    ).read_bytes()
    card = (models / "graph" / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert "base_model" not in front, "the hub refuses paths on a disk"
    assert not list(models.glob(".graph*"))


class Killed(BaseException):
    """Stands for a signal: nothing in the library catches it."""


def interrupt_after(count: int):
    calls = iter(range(count))

    def progress(written: int) -> None:
        if next(calls, None) is None:
            raise Killed

    return progress


@pytest.mark.parametrize("text", [GRAPH, GRAPH.split("---\n")[0]])
def test_an_interrupted_merge_resumes_to_the_same_bytes(models: Path, text: str) -> None:
    recipe = parse_recipe(text)
    merge(recipe, "whole")
    for count in (1, 7, 12, 20):
        try:
            merge(recipe, "out", threads=1, progress=interrupt_after(count), resume=True, overwrite=True)
        except Killed:
            assert not (models / "out").exists()
        merge(recipe, "out", resume=True)
        assert contents(models / "out").keys() == contents(models / "whole").keys()
        for name in ("model.safetensors", "mergelab.json", "config.json"):
            assert (models / "out" / name).read_bytes() == (models / "whole" / name).read_bytes()
        assert merge(recipe, "out", resume=True).seconds_streaming == 0, "a finished output is left alone"
        for file in (models / "out").iterdir():
            file.unlink()
        (models / "out").rmdir()


def test_resume_refuses_another_merge(models: Path) -> None:
    with pytest.raises(Killed):
        merge(linear("a", "b"), "out", threads=1, progress=interrupt_after(3))
    with pytest.raises(OutputError, match="resume"):
        merge(linear("b", "a"), "out", resume=True)


def test_an_output_is_not_overwritten_unasked(models: Path) -> None:
    merge(linear("a"), "out")
    before = contents(models / "out")
    with pytest.raises(OutputError, match="overwrite"):
        merge(linear("b"), "out")
    assert contents(models / "out") == before
    merge(linear("b"), "out", overwrite=True)
    assert contents(models / "out") != before


def test_nothing_is_written_when_the_recipe_or_an_input_is_wrong(models: Path) -> None:
    with pytest.raises(RecipeError, match="'c' does not exist"):
        merge(linear("a", "c"), "out")
    broken = load_file(models / "b" / "model.safetensors")
    broken["model.norm.weight"][1] = np.nan
    write_model(models / "b", broken, config={"num_hidden_layers": 3})
    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight"):
        merge(linear("a", "b"), "out")
    assert not (models / "out").exists()
    merge(linear("a", "b"), "out", allow_nonfinite=True, overwrite=True)
    assert np.isnan(load_file(models / "out" / "model.safetensors")["model.norm.weight"][1])


def test_recipe_paths_are_accepted_as_text(models: Path) -> None:
    (models / "r.yaml").write_text(recipe_yaml(linear("a")))
    assert merge("r.yaml", "out").plan.identity == plan_merge(linear("a")).identity


@pytest.mark.oracle
@pytest.mark.parametrize(
    "case", ["linear_uniform", "gpt2_linear", "qwen2_linear", "passthrough_repeat_layer", "tok_union"]
)
def test_transformers_loads_what_was_written(goldens: Path, tmp_path: Path, case: str) -> None:
    import torch
    import transformers

    merge(goldens / "recipes" / case / "config.yaml", tmp_path / "out", base_dir=goldens)
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        logits = loaded(torch.arange(12)[None]).logits
    assert torch.isfinite(logits).all()
