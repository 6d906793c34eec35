"""A model that sees merges with the language model it was built on; modules go by mergekit's names too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from mergelab.errors import RecipeError
from mergelab.merging.plan.planner import Plan, plan_merge
from mergelab.merging.recipe.recipe_file import parse_recipe
from mergelab.merging.run_merge import merge
from tests.merging.recipes import write_model

Tensors = dict[str, np.ndarray]

# How two models spell one text tower, and the other tensors of the one that sees.
SPELLINGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "flat": ("model.", "lm_head.weight", {"num_hidden_layers": 2, "vision_config": {"depth": 1}}),
    "old": (
        "language_model.model.",
        "language_model.lm_head.weight",
        {"model_type": "llava", "text_config": {"num_hidden_layers": 2}, "vision_config": {"depth": 1}},
    ),
    "new": (
        "model.language_model.",
        "lm_head.weight",
        {"model_type": "llava", "text_config": {"num_hidden_layers": 2}, "vision_config": {"depth": 1}},
    ),
    "of defaults": (
        "model.language_model.",
        "lm_head.weight",
        {"model_type": "llava", "text_config": {"model_type": "llama"}, "vision_config": {"depth": 1}},
    ),
}
OTHERS = {
    "visual.blocks.0.attn.qkv": np.full((2, 2), 7, np.float32),
    "visual.merger.mlp.2.weight": np.full((2, 2), 8, np.float32),
}


def text(value: float, lead: str, head: str) -> Tensors:
    found = {
        f"{lead}embed_tokens.weight": np.full((3, 2), value, np.float32),
        f"{lead}norm.weight": np.full(2, value, np.float32),
        head: np.full((3, 2), value, np.float32),
    }
    for i in range(2):
        found[f"{lead}layers.{i}.mlp.up_proj.weight"] = np.full((2, 2), value + i, np.float32)
    return found


def models(folder: Path, spelling: str) -> tuple[str, str]:
    """A model that sees, of ones, and a language model, of threes; the lead and the head of the first."""
    lead, head, config = SPELLINGS[spelling]
    write_model(folder / "vlm", text(1, lead, head) | OTHERS, config=config)
    kind = {"model_type": "llama"} if "model_type" in config else {}
    write_model(folder / "llm", text(3, "model.", "lm_head.weight"), config={"num_hidden_layers": 2} | kind)
    return lead, head


def merged(recipe: str, folder: Path, **options: Any) -> tuple[Plan, Tensors]:
    plan = plan_merge(parse_recipe(recipe), base_dir=folder, **options)
    merge(plan, folder / "out")
    return plan, load_file(folder / "out" / "model.safetensors")


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("order", [("vlm", "llm"), ("llm", "vlm")])
def test_a_text_tower_merges_and_the_other_towers_are_copied(
    spelling: str, order: tuple[str, str], tmp_path: Path
) -> None:
    lead, head = models(tmp_path, spelling)
    recipe = f"merge_method: linear\nmodels: [{{model: {order[0]}}}, {{model: {order[1]}}}]\n"
    plan, found = merged(recipe + "parameters: {weight: 0.5}\n", tmp_path)
    expected = text(2, lead, head) | OTHERS
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert plan.config == SPELLINGS[spelling][2] | {"torch_dtype": "float32"}
    (note,) = [warning for warning in plan.warnings if "text tower" in warning]
    assert note.startswith("model 'llm' holds only the text tower of 'vlm'")
    assert f"(model.layers.N is merged with {lead}layers.N); what it lacks (visual)" in note


@pytest.mark.parametrize("method", ["slerp", "ties", "task_arithmetic", "dare_ties", "nuslerp"])
def test_other_methods_copy_the_other_towers_too(method: str, tmp_path: Path) -> None:
    lead, head = models(tmp_path, "old")
    write_model(
        tmp_path / "base",
        text(0, "model.", "lm_head.weight"),
        config={"num_hidden_layers": 2, "model_type": "llama"},
    )
    settings = {"slerp": "{t: 0.5}", "ties": "{weight: 0.5, density: 1.0}"}.get(method, "{weight: 0.5}")
    anchor = {"slerp": "base_model: llm\n", "nuslerp": ""}.get(method, "base_model: base\n")
    both = "[{model: vlm}, {model: llm}]"
    _, found = merged(f"merge_method: {method}\n{anchor}models: {both}\nparameters: {settings}\n", tmp_path)
    assert found.keys() == text(0, lead, head).keys() | OTHERS.keys()
    for name, value in OTHERS.items():
        np.testing.assert_array_equal(found[name], value)
    # All vectors point one way, so that every method lands between the two.
    assert 1 < found[f"{lead}norm.weight"][0] < 3.01


def test_models_of_another_kind_are_still_refused(tmp_path: Path) -> None:
    models(tmp_path, "old")
    config = {"num_hidden_layers": 2, "model_type": "gpt2"}
    write_model(tmp_path / "llm", text(3, "model.", "lm_head.weight"), config=config)
    with pytest.raises(RecipeError, match="is of model_type 'gpt2' and 'vlm' of 'llava'"):
        merged(
            "merge_method: linear\nmodels: [{model: vlm}, {model: llm}]\nparameters: {weight: 1}\n", tmp_path
        )


RECIPES = {
    "ours": "{layers: *a, visual: *b}",
    "mergekit's": "{text_decoder: *a, vision_tower: *b, multi_modal_projector: *c}",
    "mergekit's without the projector": "{text_decoder: *a, vision_tower: *b}",
}


@pytest.mark.parametrize("names", RECIPES)
def test_modules_go_by_our_names_and_by_those_of_mergekit(names: str, tmp_path: Path) -> None:
    lead, head = models(tmp_path, "flat")
    others = {name: value + 2 for name, value in OTHERS.items()}
    write_model(tmp_path / "other", text(5, lead, head) | others, config=SPELLINGS["flat"][2])
    parts = {
        "*a": "{models: [{model: vlm}, {model: other}]}",
        "*b": "{models: [{model: other}]}",
        "*c": "{models: [{model: vlm}]}",
    }
    modules = RECIPES[names]
    for alias, part in parts.items():
        modules = modules.replace(alias, part)
    _, found = merged(f"merge_method: linear\nparameters: {{weight: 1}}\nmodules: {modules}\n", tmp_path)
    np.testing.assert_array_equal(found["model.norm.weight"], [3, 3])
    assert found["visual.blocks.0.attn.qkv"][0, 0] == 9
    assert found["visual.merger.mlp.2.weight"][0, 0] == (8 if "projector:" in modules else 10)


def test_the_embedding_and_head_of_t5_are_called_shared(tmp_path: Path) -> None:
    names = ["shared.weight", "encoder.block.0.layer.0.w", "decoder.block.0.layer.0.w", "lm_head.weight"]
    for folder, value in (("a", 1), ("b", 3)):
        tensors = {name: np.full((2, 2), value, np.float32) for name in names}
        write_model(tmp_path / folder, tensors, config={"num_layers": 1, "num_decoder_layers": 1})
    both = "{models: [{model: a}, {model: b}]}"
    modules = f"{{encoder: {both}, decoder: {both}, shared: {{models: [{{model: b}}]}}}}"
    _, found = merged(f"merge_method: linear\nparameters: {{weight: 1}}\nmodules: {modules}\n", tmp_path)
    assert {name: float(found[name][0, 0]) for name in names} == dict(zip(names, [3, 2, 2, 3], strict=True))


BUFFERS = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": (2,),
    "model.layers.0.attn.masked_bias": (),
    "model.layers.0.attn.bias": (1, 1, 4, 4),
    "model.layers.0.attention.bias": (1, 1, 4, 4),
    "model.embeddings.position_ids": (1, 4),
}


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties", "linear", "slerp"])
@pytest.mark.parametrize("holder", ["base", "tuned"])
def test_a_buffer_that_one_side_lacks_is_left_out(method: str, holder: str, tmp_path: Path) -> None:
    base = text(1, "model.", "lm_head.weight")
    tuned = text(3, "model.", "lm_head.weight")
    extra = {name: np.ones(shape, np.float32) for name, shape in BUFFERS.items()}
    write_model(
        tmp_path / "base", base | (extra if holder == "base" else {}), config={"num_hidden_layers": 2}
    )
    write_model(
        tmp_path / "tuned", tuned | (extra if holder == "tuned" else {}), config={"num_hidden_layers": 2}
    )
    settings = "{t: 0.5}" if method == "slerp" else "{weight: 0.5}"
    listed = "[{model: base}, {model: tuned}]" if method in ("linear", "slerp") else "[{model: tuned}]"
    anchor = "" if method == "linear" else "base_model: base\n"
    plan, found = merged(
        f"merge_method: {method}\n{anchor}models: {listed}\nparameters: {settings}\n", tmp_path
    )
    assert found.keys() == base.keys()
    (note,) = [warning for warning in plan.warnings if "left out" in warning or "missing" in warning]
    assert note.startswith(f"{len(BUFFERS)} buffer(s) that some models lack are left out")
    if method == "task_arithmetic":
        np.testing.assert_array_equal(found["model.norm.weight"], [2, 2])


def test_a_list_as_long_as_the_layers_follows_them_whatever_its_name(tmp_path: Path) -> None:
    config = {"num_hidden_layers": 2, "intermediate_size": [4, 6], "activation_sparsity": [0.5, 0.0]}
    write_model(tmp_path / "a", text(1, "model.", "lm_head.weight"), config=config)
    slices = "[{sources: [{model: a, layer_range: [1, 2]}]}, {sources: [{model: a, layer_range: [0, 2]}]}]"
    plan = plan_merge(parse_recipe(f"merge_method: passthrough\nslices: {slices}\n"), base_dir=tmp_path)
    assert plan.config["intermediate_size"] == [6, 4, 6]
    assert plan.config["activation_sparsity"] == [0.0, 0.5, 0.0]


def bert(value: float, weight: str, bias: str, lead: str = "bert.") -> Tensors:
    """The norms of a BERT of two layers and one matrix in each, all of one value."""
    norms = [f"{lead}embeddings.LayerNorm", *(f"{lead}encoder.layer.{i}.output.LayerNorm" for i in range(2))]
    found = {f"{norm}.{part}": np.full(2, value, np.float32) for norm in norms for part in (weight, bias)}
    matrices = (f"{lead}encoder.layer.{i}.output.dense.weight" for i in range(2))
    return found | {name: np.full((2, 2), value, np.float32) for name in matrices}


@pytest.mark.parametrize("order", [("old", "new"), ("new", "old")])
@pytest.mark.parametrize("lead", ["bert.", ""])
def test_norms_by_their_old_names_merge_with_those_of_today(
    order: tuple[str, str], lead: str, tmp_path: Path
) -> None:
    config = {"model_type": "bert", "num_hidden_layers": 2}
    write_model(tmp_path / "old", bert(1, "gamma", "beta", lead), config=config)
    write_model(tmp_path / "new", bert(3, "weight", "bias"), config=config)
    listed = f"models: [{{model: {order[0]}}}, {{model: {order[1]}}}]\n"
    plan, found = merged(f"merge_method: linear\nparameters: {{weight: 0.5}}\n{listed}", tmp_path)
    expected = bert(2, "weight", "bias", lead if order[0] == "old" else "bert.")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    (note,) = [warning for warning in plan.warnings if "gamma" in warning]
    assert note.startswith("model 'old' calls its norms by the old names LayerNorm.gamma and LayerNorm.beta")


def test_norms_that_all_have_their_old_names_keep_them(tmp_path: Path) -> None:
    config = {"model_type": "bert", "num_hidden_layers": 2}
    for name, value in (("a", 1), ("b", 3)):
        write_model(tmp_path / name, bert(value, "gamma", "beta"), config=config)
    plan, found = merged(
        "merge_method: linear\nparameters: {weight: 0.5}\nmodels: [{model: a}, {model: b}]\n", tmp_path
    )
    assert found.keys() == bert(2, "gamma", "beta").keys()
    assert not any("gamma" in warning for warning in plan.warnings)
