"""What the output takes from which model: tied heads, configs, adapters on results to come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mergelab.checkpoints import open_checkpoint, read_whole, with_lora
from mergelab.checkpoints.lora_variants import StartFactors
from mergelab.errors import RecipeError
from mergelab.merging import Recipe, merge, plan_merge
from mergelab.merging.plan.planner import Plan
from mergelab.merging.recipe.recipe_file import parse_recipe
from tests.merging.recipes import write_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tied(folder: Path, *, seed: int, head: Any = None, **config: Any) -> Path:
    """A model whose config ties its head, stored as well if `head` is given."""
    write_model(folder, drop=[HEAD], seed=seed)
    tensors = load_file(folder / "model.safetensors")
    if head is not None:
        tensors[HEAD] = tensors[EMBEDDING] * np.float32(head)
    stated = {"model_type": "tiny", "num_hidden_layers": 3, "vocab_size": 6, "hidden_size": 4}
    return write_model(folder, tensors, config=stated | {"tie_word_embeddings": True} | config)


def linear(folder: Path, *models: str, **fields: Any) -> Plan:
    weights = {"parameters": {"weight": 1}} | fields
    return plan_merge(
        Recipe(merge_method="linear", models=[{"model": m} for m in models], **weights), base_dir=folder
    )


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a"), ("a", "b", "c")])
def test_a_head_that_one_of_tied_models_stores_stays_tied(order: tuple[str, ...], tmp_path: Path) -> None:
    tied(tmp_path / "a", seed=1)
    tied(tmp_path / "b", seed=2, head=1)
    tied(tmp_path / "c", seed=3)
    plan = linear(tmp_path, *order)
    assert HEAD not in [job.name for job in plan.jobs] and plan.config["tie_word_embeddings"] is True
    assert not any(HEAD in warning for warning in plan.warnings)
    merged = load_file(merge(plan, tmp_path / "out").out / "model.safetensors")
    expected = np.mean([load_file(tmp_path / m / "model.safetensors")[EMBEDDING] for m in order], axis=0)
    np.testing.assert_allclose(merged[EMBEDDING], expected, rtol=1e-6)


def test_heads_that_all_store_or_that_differ_are_written(tmp_path: Path) -> None:
    tied(tmp_path / "a", seed=1)
    tied(tmp_path / "same", seed=2, head=1)
    tied(tmp_path / "other", seed=3, head=2)
    tied(tmp_path / "untied", seed=4, head=1, tie_word_embeddings=False)
    both = linear(tmp_path, "same", "same/.")
    assert HEAD in [job.name for job in both.jobs] and both.config["tie_word_embeddings"] is True
    for model in ("other", "untied"):
        plan = linear(tmp_path, "a", model)
        assert HEAD in [job.name for job in plan.jobs] and plan.config["tie_word_embeddings"] is False
        assert any("differs from the embedding after merging" in warning for warning in plan.warnings)


def test_a_donor_without_a_config_is_described_by_another_model(tmp_path: Path) -> None:
    write_model(tmp_path / "bare", seed=1)
    (tmp_path / "bare" / "config.json").unlink()
    write_model(tmp_path / "whole", seed=2)
    (tmp_path / "whole" / "tokenizer_config.json").write_text("{}")
    plan = linear(tmp_path, "bare", "whole")
    assert plan.config["num_hidden_layers"] == 3 and "tokenizer_config.json" in plan.files
    assert "model 'bare' has no config.json: the output's is made of that of 'whole'" in plan.warnings
    assert linear(tmp_path, "bare").config == {}
    assert any("so the output gets none" in warning for warning in linear(tmp_path, "bare").warnings)
    slices = [{"sources": [{"model": m, "layer_range": [0, 2]}]} for m in ("bare", "whole")]
    stacked = plan_merge(Recipe(merge_method="passthrough", slices=slices), base_dir=tmp_path)
    assert stacked.config["num_hidden_layers"] == 4


def adapter(folder: Path, *names: str) -> Path:
    folder.mkdir()
    random = np.random.default_rng(9)
    tensors = {
        f"base_model.model.{name}.lora_{part}.weight": random.normal(size=shape).astype(np.float32)
        for name in names
        for part, shape in (("A", (2, 4)), ("B", (4, 2)))
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_an_adapter_may_be_added_to_the_result_of_a_step(tmp_path: Path) -> None:
    for seed, name in enumerate("abc"):
        write_model(tmp_path / name, seed=seed)
    adapter(tmp_path / "law", "model.layers.0.attn", "model.layers.2.mlp")
    step = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 0.5}\n"
    last = "merge_method: slerp\nbase_model: c\nmodels: [{model: c}, {model: MODEL}]\nparameters: {t: 0.3}\n"
    text = f"name: step\n{step}---\n{last.replace('MODEL', 'step+law')}"
    plan = plan_merge(parse_recipe(text), base_dir=tmp_path)
    graph = load_file(merge(plan, tmp_path / "graph").out / "model.safetensors")

    merge(plan_merge(parse_recipe(step), base_dir=tmp_path), tmp_path / "step")
    by_hand = last.replace("MODEL", "step+law")
    single = merge(plan_merge(parse_recipe(by_hand), base_dir=tmp_path), tmp_path / "single").out
    found = load_file(single / "model.safetensors")
    assert all(np.array_equal(graph[name], found[name]) for name in found)
    # The control: the adapter does change what is merged.
    changed = with_lora(open_checkpoint(tmp_path / "step"), tmp_path / "law").tensors[
        "model.layers.0.attn.weight"
    ]
    plain = load_file(tmp_path / "step" / "model.safetensors")["model.layers.0.attn.weight"]
    assert np.abs(read_whole(changed) - plain).max() > 0.1


def test_a_base_in_another_spelling_is_named_where_one_model_too_many_is_found(tmp_path: Path) -> None:
    text = "merge_method: slerp\nbase_model: a/\nmodels: [{model: a}, {model: b}]\nparameters: {t: 0.3}\n"
    with pytest.raises(
        RecipeError, match=r"found 2 \(a, b\): 'a' is the base model 'a/', so write both alike"
    ):
        parse_recipe(text)


def test_lists_as_long_as_the_layers_follow_them_under_any_name(tmp_path: Path) -> None:
    stated = {"model_type": "tiny", "num_hidden_layers": 3, "hidden_size": 4}
    lists = {"intermediate_size": [8, 16, 32], "rope_thetas": [1e4, 1e5, 1e6], "eos_token_id": [1, 2, 3]}
    write_model(tmp_path / "a", config=stated | lists)
    ranges = ([0, 2], [1, 3])
    slices = [{"sources": [{"model": "a", "layer_range": r}]} for r in ranges]
    config = plan_merge(Recipe(merge_method="passthrough", slices=slices), base_dir=tmp_path).config
    assert config["intermediate_size"] == [8, 16, 16, 32] and config["rope_thetas"] == [1e4, 1e5, 1e5, 1e6]
    assert config["eos_token_id"] == [1, 2, 3], "ids of tokens are not of layers"


@pytest.mark.parametrize("case", ["dora", "pissa", "tokens", "experts"])
def test_variants_of_adapters_merge_in_a_recipe(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Path(__file__).parents[1] / "checkpoints" / "data" / "lora" / case
    base, expected = load_file(data / "model.safetensors"), load_file(data / "merged.safetensors")
    write_model(tmp_path / "base", base, config={"model_type": "tiny", "num_hidden_layers": 2})
    fields = {"base_model": "base", "parameters": {"weight": 0.5}}
    model = f"base+{data / 'adapter'}"
    recipe = Recipe(merge_method="task_arithmetic", models=[{"model": model}], **fields)
    taken: list[str] = []
    take = StartFactors.take
    monkeypatch.setattr(StartFactors, "take", lambda self, side: (taken.append(side), take(self, side))[1])
    plan = plan_merge(recipe, base_dir=tmp_path)
    assert not taken, "a plan decomposes no matrix"
    merged = load_file(merge(plan, tmp_path / "out").out / "model.safetensors")
    assert bool(taken) == (case == "pissa")
    for name, value in merged.items():
        np.testing.assert_allclose(value, (base[name] + expected[name]) / 2, rtol=0, atol=1e-6)
