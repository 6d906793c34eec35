"""Models that must not be merged are refused in the plan; what only looks odd is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergelab.errors import RecipeError
from mergelab.merging.plan.compatibility import is_buffer
from mergelab.merging.plan.planner import Plan, plan_merge
from mergelab.merging.recipe.recipe_file import parse_recipe
from mergelab.merging.recipe.schema import Recipe
from tests.merging.recipes import write_model

MATRIX, VECTOR = (4, 4), (4,)


def llama(folder: Path, *, layers: Any = range(3), extra: Any = (), drop: Any = (), **config: Any) -> Path:
    """A tiny model with the names of Llama; `extra` adds suffixes to each layer."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (6, 4), "model.norm.weight": VECTOR}
    for i in layers:
        shapes |= {f"model.layers.{i}.self_attn.q_proj.weight": MATRIX}
        shapes |= {f"model.layers.{i}.mlp.up_proj.weight": MATRIX}
        for suffix in extra:  # the causal mask has the axes of attention, where a bias has one
            shapes[f"model.layers.{i}.{suffix}"] = (1, 1, 4, 4) if suffix == "attn.bias" else VECTOR
    random = np.random.default_rng(0)
    tensors = {n: random.normal(size=s).astype(np.float32) for n, s in shapes.items() if n not in drop}
    stated = {"model_type": "llama", "num_hidden_layers": 3, "hidden_size": 4}
    return write_model(folder, tensors, config=stated | config)


def linear(folder: Path, *models: str, method: str = "linear", **options: Any) -> Plan:
    fields: dict[str, Any] = {"merge_method": method, "models": [{"model": m} for m in models]}
    if method in ("linear", "task_arithmetic"):
        fields["parameters"] = {"weight": 1}
    if method == "task_arithmetic":
        fields["base_model"] = models[0]
    return plan_merge(Recipe(**fields), base_dir=folder, **options)


LACKS = {
    "a hole": ([0, 2], r"states 3 layers, but the weights lack layer 1 \(model.layers.N\)"),
    "the last": ([0, 1], "lack layer 2"),
    "the first": ([1, 2], "lack layer 0"),
    "nearly all": ([2], "lack layer 0, 1"),
    "all": ([], "no tensor belongs to one"),
    "one of more than stated": ([0, 2, 3], "it has a layer 3, but the weights lack layer 1"),
}


@pytest.mark.parametrize("method", ["linear", "passthrough"])
@pytest.mark.parametrize("case", LACKS)
def test_layers_that_are_not_there_are_named(case: str, method: str, tmp_path: Path) -> None:
    layers, message = LACKS[case]
    llama(tmp_path / "broken", layers=layers)
    with pytest.raises(RecipeError, match=f"'broken': .*{message}.*incomplete"):
        linear(tmp_path, "broken", method=method)
    llama(tmp_path / "whole")
    assert len(linear(tmp_path, "whole", method=method).jobs) == 8


def test_layers_that_no_config_counts_are_not_missed(tmp_path: Path) -> None:
    """Layers for multi-token prediction lie beyond the count; ALBERT stores one layer for twelve."""
    llama(tmp_path / "mtp", layers=range(4))
    llama(tmp_path / "albert", layers=[0], num_hidden_layers=12, num_hidden_groups=1)
    for name in ("mtp", "albert"):
        assert linear(tmp_path, name).jobs
    (tmp_path / "mtp" / "config.json").unlink()
    assert linear(tmp_path, "mtp").jobs


def test_a_projector_with_gaps_between_its_numbers_is_whole(tmp_path: Path) -> None:
    folder = llama(tmp_path / "vlm")
    from safetensors.numpy import load_file

    tensors = load_file(folder / "model.safetensors")
    tensors |= {f"mlp1.{i}.weight": np.ones(4, np.float32) for i in (0, 1, 3)}
    config = json.loads((folder / "config.json").read_text()) | {"vision_config": {"num_hidden_layers": 24}}
    write_model(folder, tensors, config=config)
    assert len(linear(tmp_path, "vlm").jobs) == 11


@pytest.mark.parametrize(
    "drop", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_a_tensor_that_one_model_lacks_is_refused_unless_told(drop: str, tmp_path: Path) -> None:
    llama(tmp_path / "a")
    llama(tmp_path / "b", drop=[drop])
    for order in (("a", "b"), ("b", "a")):
        with pytest.raises(RecipeError, match=f"'{drop}' is missing from 'b', though other models have it"):
            linear(tmp_path, *order)
    told = linear(tmp_path, "a", "b", allow_mixed_architectures=True)
    assert any(f"'{drop}' is missing from 'b'" in warning for warning in told.warnings)


BUFFERS = ["self_attn.rotary_emb.inv_freq", "attn.masked_bias", "attn.bias"]


@pytest.mark.parametrize("buffer", BUFFERS)
def test_a_buffer_that_old_checkpoints_hold_is_no_part_of_the_architecture(
    buffer: str, tmp_path: Path
) -> None:
    llama(tmp_path / "plain")
    llama(tmp_path / "old", extra=[buffer])
    assert len(linear(tmp_path, "plain", "old").jobs) >= 8
    merged = linear(tmp_path, "plain", "old", method="task_arithmetic")
    assert len(merged.jobs) == 8, "without the base there is nothing to take a difference from"
    assert any("left out" in warning for warning in merged.warnings)


def test_biases_of_projections_are_no_buffers() -> None:
    assert not is_buffer("model.layers.0.self_attn.q_proj.bias")
    assert not is_buffer("h.0.attn.c_attn.bias")
    assert is_buffer("h.0.attn.bias") and not is_buffer("h.0.attn.bias", 1)


def test_a_tied_head_may_be_absent(tmp_path: Path) -> None:
    llama(tmp_path / "tied", tie_word_embeddings=True)
    folder = llama(tmp_path / "untied", tie_word_embeddings=False)
    from safetensors.numpy import load_file

    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    write_model(folder, tensors | {"lm_head.weight": np.ones((6, 4), np.float32)}, config=config)
    assert len(linear(tmp_path, "tied", "untied").jobs) == 9


def test_models_of_another_type_are_refused_unless_told(tmp_path: Path) -> None:
    llama(tmp_path / "a")
    llama(tmp_path / "b", model_type="mistral")
    for method in ("linear", "task_arithmetic"):
        with pytest.raises(RecipeError, match=r"'b' is of model_type 'mistral' and 'a' of 'llama'.*--allow"):
            linear(tmp_path, "a", "b", method=method)
    told = linear(tmp_path, "a", "b", allow_mixed_architectures=True)
    assert any("model_type is 'mistral' in model 'b'" in warning for warning in told.warnings)
    stack = (
        "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [0, 2]}]\n"
        "- sources: [{model: b, layer_range: [1, 3]}]\n"
    )
    with pytest.raises(RecipeError, match="of model_type 'mistral'"):
        plan_merge(parse_recipe(stack), base_dir=tmp_path)
    assert plan_merge(parse_recipe(stack), base_dir=tmp_path, allow_mixed_architectures=True).jobs


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}},
            {"model_type": "gemma3_text"},
        ),
        ({"model_type": "llava", "text_config": {"model_type": "llama"}}, {"model_type": "llama"}),
        ({"model_type": None}, {"model_type": "llama"}),
    ],
)
def test_a_text_tower_is_of_the_type_of_its_model(one: Any, other: Any, tmp_path: Path) -> None:
    llama(tmp_path / "a", **one)
    llama(tmp_path / "b", **other)
    assert len(linear(tmp_path, "a", "b").jobs) == 8


def test_llama_and_qwen3_are_refused_for_their_type_and_for_what_one_lacks(tmp_path: Path) -> None:
    norms = ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]
    llama(tmp_path / "llama")
    llama(tmp_path / "qwen", extra=norms, model_type="qwen3")
    with pytest.raises(RecipeError, match="'qwen' is of model_type 'qwen3'"):
        linear(tmp_path, "llama", "qwen")
    llama(tmp_path / "qwen", extra=norms)
    with pytest.raises(RecipeError, match=r"6 tensors .*k_norm.* are missing from 'llama'"):
        linear(tmp_path, "llama", "qwen")


PACKED = ["self_attn.o_proj.qweight", "self_attn.o_proj.weight_scale_inv", "self_attn.o_proj.weight.absmax"]


@pytest.mark.parametrize("suffix", PACKED)
def test_parts_of_packed_weights_are_not_averaged(suffix: str, tmp_path: Path) -> None:
    llama(tmp_path / "plain")
    llama(tmp_path / "packed", extra=[suffix], quantization_config={"quant_method": "gptq"})
    for models in (("plain", "packed"), ("packed", "plain"), ("packed",)):
        with pytest.raises(RecipeError, match=f"packed.*{suffix}.*quantize the model again"):
            linear(tmp_path, *models)
    with pytest.raises(RecipeError, match=f"packed.*{suffix}"):
        linear(tmp_path, "packed", method="passthrough")
    llama(tmp_path / "left over", quantization_config={"quant_method": "gptq"})
    plan = linear(tmp_path, "left over", "plain")
    assert plan.jobs
    assert "quantization_config" not in plan.config
