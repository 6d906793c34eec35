"""Structure inferred from tensor names: blocks, towers, what comes before and after, for many families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergelab.errors import RecipeError
from mergelab.merging.plan.output_config import output_config
from mergelab.merging.plan.planner import plan_merge
from mergelab.merging.recipe.recipe_file import parse_recipe
from mergelab.merging.recipe.schema import Recipe
from mergelab.merging.structure.architecture import Module, infer_architecture
from tests.merging.recipes import write_model


def blocks(prefix: str, count: int, *suffixes: str) -> list[str]:
    return [f"{prefix}{i}.{suffix}" for i in range(count) for suffix in suffixes]


# family: names, config, {module: (stack prefix, count, pre, post)}
FAMILIES: dict[str, tuple[list[str], Mapping[str, Any], dict[str, tuple[str, int, list[str], list[str]]]]] = {
    "llama": (
        [
            "lm_head.weight",
            "model.embed_tokens.weight",
            *blocks("model.layers.", 2, "mlp.w"),
            "model.norm.weight",
        ],
        {"num_hidden_layers": 2},
        {
            "default": (
                "model.layers.",
                2,
                ["model.embed_tokens.weight"],
                ["lm_head.weight", "model.norm.weight"],
            )
        },
    ),
    "gpt2": (
        ["wte.weight", "wpe.weight", *blocks("h.", 3, "ln_1.weight", "attn.c_attn.weight"), "ln_f.weight"],
        {"n_layer": 3},
        {"default": ("h.", 3, ["wte.weight", "wpe.weight"], ["ln_f.weight"])},
    ),
    "gpt-neox": (
        [
            "gpt_neox.embed_in.weight",
            *blocks("gpt_neox.layers.", 2, "attention.dense.weight"),
            "gpt_neox.final_layer_norm.weight",
            "embed_out.weight",
        ],
        {"num_hidden_layers": 2},
        {
            "default": (
                "gpt_neox.layers.",
                2,
                ["gpt_neox.embed_in.weight"],
                ["gpt_neox.final_layer_norm.weight", "embed_out.weight"],
            )
        },
    ),
    "bert": (
        [
            "embeddings.word_embeddings.weight",
            "embeddings.LayerNorm.weight",
            *blocks("encoder.layer.", 2, "output.dense.weight"),
            "pooler.dense.weight",
        ],
        {"num_hidden_layers": 2},
        {
            "default": (
                "encoder.layer.",
                2,
                ["embeddings.word_embeddings.weight", "embeddings.LayerNorm.weight"],
                ["pooler.dense.weight"],
            )
        },
    ),
    "mixture of experts": (
        [
            "model.embed_tokens.weight",
            *blocks("model.layers.", 2, "moe.experts.0.w", "moe.experts.1.w", "moe.gate.w"),
        ],
        {"num_hidden_layers": 2},
        {"default": ("model.layers.", 2, ["model.embed_tokens.weight"], [])},
    ),
    "vision and language": (
        [
            "vision_tower.vision_model.embeddings.patch_embedding.weight",
            *blocks("vision_tower.vision_model.encoder.layers.", 3, "mlp.w"),
            "vision_tower.vision_model.post_layernorm.weight",
            "multi_modal_projector.layers.0.weight",
            "multi_modal_projector.layers.1.weight",
            "language_model.model.embed_tokens.weight",
            *blocks("language_model.model.layers.", 4, "mlp.w"),
            "language_model.model.norm.weight",
            "language_model.lm_head.weight",
        ],
        {"vision_config": {"num_hidden_layers": 3}, "text_config": {"num_hidden_layers": 4}},
        {
            "vision_tower": (
                "vision_tower.vision_model.encoder.layers.",
                3,
                ["vision_tower.vision_model.embeddings.patch_embedding.weight"],
                ["vision_tower.vision_model.post_layernorm.weight"],
            ),
            "language_model": (
                "language_model.model.layers.",
                4,
                ["language_model.model.embed_tokens.weight"],
                ["language_model.model.norm.weight", "language_model.lm_head.weight"],
            ),
            "multi_modal_projector": (
                "",
                0,
                ["multi_modal_projector.layers.0.weight", "multi_modal_projector.layers.1.weight"],
                [],
            ),
        },
    ),
    "whisper": (
        [
            "model.encoder.conv1.weight",
            *blocks("model.encoder.layers.", 2, "fc1.weight"),
            "model.encoder.layer_norm.weight",
            "model.decoder.embed_tokens.weight",
            *blocks("model.decoder.layers.", 2, "fc1.weight"),
            "model.decoder.layer_norm.weight",
            "proj_out.weight",
        ],
        {"encoder_layers": 2, "decoder_layers": 2, "num_hidden_layers": 2},
        {
            "encoder": (
                "model.encoder.layers.",
                2,
                ["model.encoder.conv1.weight"],
                ["model.encoder.layer_norm.weight"],
            ),
            "decoder": (
                "model.decoder.layers.",
                2,
                ["model.decoder.embed_tokens.weight"],
                ["model.decoder.layer_norm.weight"],
            ),
            "proj_out": ("", 0, ["proj_out.weight"], []),
        },
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    names, config, expected = FAMILIES[family]
    found = infer_architecture(names, config)

    def seen(module: Module) -> tuple[str, int, list[str], list[str]]:
        stack = module.stack
        return (
            stack.prefix if stack else "",
            stack.count if stack else 0,
            list(module.pre),
            list(module.post),
        )

    assert {name: seen(module) for name, module in found.modules.items()} == expected
    assert sorted(all_names(found.modules)) == sorted(names)


def all_names(modules: Mapping[str, Module]) -> list[str]:
    found: list[str] = []
    for module in modules.values():
        found += [*module.pre, *module.post]
        if module.stack is not None:
            for i, suffixes in enumerate(module.stack.suffixes):
                found += [f"{module.stack.prefix}{i}.{suffix}" for suffix in suffixes]
    return found


part = st.sampled_from(["model", "layers", "h", "0", "1", "2", "norm", "embed", "w", "lm_head", "vision"])


@given(
    st.lists(st.lists(part, min_size=1, max_size=6).map(".".join), unique=True, max_size=12),
    st.integers(1, 3),
)
def test_no_name_is_ever_lost_or_doubled(names: list[str], layers: int) -> None:
    for config in ({}, {"num_hidden_layers": layers}, {"vision_config": {"depth": 2}, "n_layer": layers}):
        assert sorted(all_names(infer_architecture(names, config).modules)) == sorted(names)


def multimodal(folder: Any, seed: int) -> None:
    names, config, _ = FAMILIES["vision and language"]
    random = np.random.default_rng(seed)
    write_model(folder, {name: random.normal(size=2).astype(np.float32) for name in names}, config=config)


def test_modules_are_merged_each_its_own_way_and_all_must_be_named(tmp_path) -> None:
    multimodal(tmp_path / "a", 0)
    multimodal(tmp_path / "b", 1)
    text = """merge_method: linear
parameters: {weight: 1}
modules:
  vision_tower: {models: [{model: a}]}
  multi_modal_projector: {models: [{model: b}]}
  language_model:
    slices:
    - sources: [{model: a, layer_range: [0, 4]}]
    - sources: [{model: b, layer_range: [2, 4]}]
"""
    plan = plan_merge(parse_recipe(text), base_dir=tmp_path)
    assert plan.config["vision_config"]["num_hidden_layers"] == 3
    assert plan.config["text_config"]["num_hidden_layers"] == 6
    owners = {job.name: job.model_names for job in plan.jobs}
    assert owners["multi_modal_projector.layers.1.weight"] == ("b",)
    assert owners["language_model.model.layers.5.mlp.w"] == ("b",)
    assert owners["vision_tower.vision_model.encoder.layers.2.mlp.w"] == ("a",)
    short = text.replace("  multi_modal_projector: {models: [{model: b}]}\n", "")
    with pytest.raises(RecipeError, match="module 'multi_modal_projector' of the models is left out"):
        plan_merge(parse_recipe(short), base_dir=tmp_path)
    with pytest.raises(RecipeError, match=r"no module of this name \(did you mean 'vision_tower'\?\)"):
        plan_merge(parse_recipe(text.replace("vision_tower", "vision_towel")), base_dir=tmp_path)
    flat = "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 2]}]}]\n"
    with pytest.raises(RecipeError, match=r"several towers \(language_model, vision_tower\)"):
        plan_merge(parse_recipe(flat), base_dir=tmp_path)


def test_models_form_reaches_every_tower(tmp_path) -> None:
    multimodal(tmp_path / "a", 0)
    multimodal(tmp_path / "b", 1)
    recipe = Recipe(merge_method="karcher", models=[{"model": "a"}, {"model": "b"}])
    plan = plan_merge(recipe, base_dir=tmp_path)
    assert {job.name for job in plan.jobs} == set(FAMILIES["vision and language"][0])
    assert all(len(job.sources) == 2 for job in plan.jobs)


def test_the_right_layer_count_is_set_when_two_towers_are_equally_deep() -> None:
    names = [*blocks("model.visual.blocks.", 2, "w"), *blocks("model.language_model.layers.", 2, "w")]
    config = {
        "vision_config": {"depth": 2},
        "text_config": {"num_hidden_layers": 2, "layer_types": ["x", "y"]},
    }
    found = infer_architecture(names, config)
    layers = {"language_model": (("m", 0), ("m", 1), ("m", 1))}
    result, _ = output_config({"m": config}, "m", found, layers, [], {})
    assert result["text_config"] == {"num_hidden_layers": 3, "layer_types": ["x", "y", "y"]}
    assert result["vision_config"] == {"depth": 2}
    assert config["text_config"]["num_hidden_layers"] == 2
