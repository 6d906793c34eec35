"""Layers that are moved, cut or repeated keep their kinds, as transformers reads them, or it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from mergelab.errors import RecipeError
from mergelab.merging import Recipe, merge
from mergelab.merging.plan.output_config import output_config
from mergelab.merging.plan.planner import plan_merge
from mergelab.merging.structure.architecture import infer_architecture
from mergelab.merging.structure.layer_fields import layer_fields
from mergelab.merging.structure.layer_kinds import same_kind
from mergelab.models.families import model_from_config
from mergelab.models.load import load_model
from tests.merging.layer_cases import CONFIGS, SLICES, order, recipe, write_layers
from tests.merging.layers_in_transformers import RECORDED
from tests.merging.recipes import write_model
from tests.models.tiny_models import weights
from tests.slow import slow_except

S, F = "sliding_attention", "full_attention"
OURS = ("gemma2", "gemma3", "qwen2", "qwen3", "mistral")
"""The cases that mergelab runs itself."""


def write_ours(folder: Path, name: str) -> Path:
    """A model with weights from a formula."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    save_file(
        weights(model_from_config(CONFIGS[name])), folder / "model.safetensors", metadata={"format": "pt"}
    )
    return folder


def moved(config: dict[str, Any], layers: list[int], count: int = 6) -> tuple[dict[str, Any], list[str]]:
    """The config of a model of the given layers of a model "m", and warnings."""
    architecture = infer_architecture([f"model.layers.{i}.w" for i in range(count)], config)
    assert architecture.modules["default"].stack is not None
    blocks = {"default": tuple(("m", i) for i in layers)}
    return output_config({"m": config}, "m", architecture, blocks, [], {})


def sized(model_type: str, count: int, **fields: Any) -> dict[str, Any]:
    return {"model_type": model_type, "num_hidden_layers": count, **fields}


TWICE = [0, 1, 2, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("config", "layers", "expected"),
    [
        (sized("gemma2", 4), [0, 1, 1, 2, 3], {"layer_types": [S, F, F, S, F]}),
        (sized("gemma3_text", 6, sliding_window_pattern=3), TWICE, {"layer_types": [S, S, F, F, S, S, F]}),
        (
            sized("qwen2", 6, use_sliding_window=True, max_window_layers=3, sliding_window=3),
            TWICE,
            {"layer_types": [F, F, F, F, S, S, S]},
        ),
        (sized("smollm3", 6, no_rope_layer_interval=3), TWICE, {"no_rope_layers": [1, 1, 0, 0, 1, 1, 0]}),
        (sized("qwen3_moe", 6, mlp_only_layers=[1]), [0, 1, 1, 2, 3, 4, 5], {"mlp_only_layers": [1, 2]}),
        (
            sized("qwen3_moe", 6, mlp_only_layers=[], decoder_sparse_step=2),
            [1, 1, 2],
            {"mlp_only_layers": [2], "decoder_sparse_step": 1},
        ),
        (
            sized("recurrent_gemma", 6, block_types=["recurrent", "recurrent", "attention"]),
            TWICE,
            {"block_types": [*["recurrent"] * 2, *["attention"] * 2, *["recurrent"] * 2, "attention"]},
        ),
        (
            sized("llama4_text", 6, moe_layers=[1, 3, 5], interleave_moe_layer_step=2),
            TWICE,
            {"moe_layers": [1, 4, 6]},
        ),
        (
            {"model_type": "nemotron_h", "layers_block_type": ["mamba", "mlp", "attention", "mlp"]},
            [0, 1, 0, 1, 2, 3],
            {"layers_block_type": ["mamba", "mlp", "mamba", "mlp", "attention", "mlp"]},
        ),
        (sized("nemotron_h", 4, hybrid_override_pattern="M-*-"), [0, 2], {"hybrid_override_pattern": "M*"}),
        (
            sized("gemma3n_text", 6, intermediate_size=[1, 2, 3, 4, 5, 6], num_kv_shared_layers=0),
            [0, 1, 4, 5],
            {"intermediate_size": [1, 2, 5, 6], "layer_types": [S, S, F, S]},
        ),
        (sized("gpt_neo", 4, attention_types=[[["global", "local"], 2]]), [0, 0, 1], {
            "attention_types": [[["global", "global", "local"], 1]]}),
        (sized("gemma4_text", 6, num_kv_shared_layers=2, layer_types=[S, F] * 3), [0, 1, 4, 5], {
            "num_kv_shared_layers": 2, "layer_types": [S, F, S, F]}),
        (CONFIGS["jamba"] | {"expert_layer_period": 1, "expert_layer_offset": 0}, [0, 2, 3, 4], {
            "attn_layer_period": 4, "attn_layer_offset": 3}),
        (sized("deepseek_v3", 6, first_k_dense_replace=2), [0, 0, 1, 4], {"first_k_dense_replace": 3}),
        (sized("kimi_k2", 6, first_k_dense_replace=2), [0, 4, 5], {"first_k_dense_replace": 1}),
        (sized("new", 3, widths=[1, 2, 3], heads={"0": 4, "2": 8}), [2, 2, 0], {
            "widths": [3, 3, 1], "heads": {"0": 8, "1": 8, "2": 4}}),
    ],
    ids=lambda value: value.get("model_type") if isinstance(value, dict) else None,
)  # fmt: skip
def test_the_kind_of_each_layer_is_written_out(
    config: dict[str, Any], layers: list[int], expected: dict[str, Any]
) -> None:
    count = config.get("num_hidden_layers", len(config.get("layers_block_type", ())))
    before = json.dumps(config)
    result, _ = moved(config, layers, count)
    assert {key: result[key] for key in expected} == expected
    assert result.get("num_hidden_layers", len(layers)) == len(layers)
    assert json.dumps(config) == before


def test_the_text_part_of_a_nested_config_is_the_one_that_changes() -> None:
    config = {
        "model_type": "gemma3",
        "text_config": {"num_hidden_layers": 6, "sliding_window_pattern": 3},
        "vision_config": {"num_hidden_layers": 3, "model_type": "siglip_vision_model"},
    }
    architecture = infer_architecture(
        [f"model.language_model.layers.{i}.w" for i in range(6)]
        + [f"model.vision_tower.layers.{i}.w" for i in range(3)],
        config,
    )
    blocks = {"language_model": tuple(("m", i) for i in TWICE)}
    result, _ = output_config({"m": config}, "m", architecture, blocks, [], {})
    assert result["text_config"]["layer_types"] == [S, S, F, F, S, S, F]
    assert result["text_config"]["num_hidden_layers"] == 7
    assert result["vision_config"] == config["vision_config"]


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_in_their_own_places_change_nothing(name: str) -> None:
    assert moved(CONFIGS[name], list(range(6))) == (CONFIGS[name], [])


@pytest.mark.parametrize("name", CONFIGS)
def test_kinds_are_those_that_transformers_reads(name: str) -> None:
    expected = json.loads(RECORDED.read_text())["source"][name]
    found = {field.name: field.read(CONFIGS[name], 6) for field in layer_fields(CONFIGS[name], ())}
    for key, kinds in expected.items():
        if key in found and key != "moe_layers":
            assert all(map(same_kind, found[key], kinds)), key


@settings(deadline=None, max_examples=8)
@given(data=st.data())
@pytest.mark.parametrize("name", CONFIGS)
def test_any_layers_keep_their_kinds_or_are_refused(name: str, data: st.DataObject) -> None:
    config = CONFIGS[name]
    layers = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=9))
    try:
        result, _ = moved(config, layers)
    except RecipeError as error:
        assert all(sentence.startswith("config.json: layer ") for sentence in error.faults)
        return
    for field in layer_fields(config, ()):
        source = field.read(config, 6)
        assert all(map(same_kind, field.read(result, len(layers)), [source[i] for i in layers]))


def test_refusals_name_the_field_and_the_layers() -> None:
    config = sized("deepseek_v3", 4, first_k_dense_replace=1)
    with pytest.raises(RecipeError) as error:
        moved(config, [0, 1, 0, 1, 2, 3], 4)
    (sentence,) = error.value.faults
    for part in (
        "layer 2 of the output is layer 0 of 'm'",
        "'dense'",
        "'first_k_dense_replace'",
        "'experts'",
    ):
        assert part in sentence
    with pytest.raises(
        RecipeError, match="'scale_attn_by_inverse_layer_idx' can only make it 'scaled by 1/2'"
    ):
        moved({"model_type": "gpt2", "n_layer": 3, "scale_attn_by_inverse_layer_idx": True}, [0, 0, 1], 3)
    kept, _ = moved({"model_type": "gpt2", "n_layer": 3, "scale_attn_by_inverse_layer_idx": True}, [0, 1], 3)
    assert kept["n_layer"] == 2
    with pytest.raises(RecipeError, match="'expert_layer_period'"):
        moved(CONFIGS["jamba"], [0, 1, 2, 0, 1, 2, 3])
    with pytest.raises(RecipeError, match="'num_mem_blocks'"):
        moved(sized("zamba2", 4, layers_block_type=["mamba", "hybrid", "mamba", "hybrid"]), [0, 3], 4)
    shared = sized("gemma3n_text", 6, num_kv_shared_layers=2, layer_types=[S, F] * 3)
    with pytest.raises(RecipeError, match="'no keys to share'"):
        moved(shared, [0, 2, 4, 5])
    with pytest.raises(RecipeError, match=r"config.json of model 'm': .* 'max_window_layers'"):
        moved(sized("qwen2", 6, use_sliding_window=True, max_window_layers="all"), TWICE)


@pytest.mark.parametrize("name", CONFIGS)
def test_senseless_values_are_refused_or_passed_over(name: str) -> None:
    keys = {key for field in layer_fields(CONFIGS[name], ()) for key in field.uses}
    for key in sorted(keys):
        for value in ("x", [], {}, {"0": 1}, -1, 0, 2.5, [["x"]], [[["x"], "y"]], True, ["x"] * 6, 10**9):
            try:
                moved({**CONFIGS[name], key: value}, TWICE)
            except RecipeError as error:
                assert all(len(sentence) < 500 for sentence in error.faults)


def test_each_layer_is_of_the_kind_it_has_in_its_own_model() -> None:
    config = sized("gemma3_text", 6, sliding_window_pattern=3)
    other = sized("gemma3_text", 6, sliding_window_pattern=2)
    architecture = infer_architecture([f"model.layers.{i}.w" for i in range(6)], config)
    blocks = {"default": (("m", 0), ("m", 1), ("n", 2), ("n", 3), ("m", 4), ("m", 5))}
    result, _ = output_config({"m": config, "n": other}, "m", architecture, blocks, [], {})
    assert result["layer_types"] == [S, S, S, F, S, F]
    same = {"default": tuple(("n", i) for i in range(6))}
    assert output_config({"m": config, "n": config}, "m", architecture, same, [], {})[0] == config


def test_a_window_that_the_donor_has_switched_off_cannot_be_had() -> None:
    config = sized("qwen2", 4, use_sliding_window=False, sliding_window=8, max_window_layers=2)
    architecture = infer_architecture([f"model.layers.{i}.w" for i in range(4)], config)
    blocks = {"default": (("m", 0), ("m", 1), ("n", 2), ("n", 3))}
    configs = {"m": config, "n": config | {"use_sliding_window": True}}
    with pytest.raises(RecipeError, match=r"layer 2 .* 'n' and 'sliding_attention' there, but 'layer_types'"):
        output_config(configs, "m", architecture, blocks, [], {})


def test_fields_that_may_go_by_layer_number_are_named() -> None:
    config = sized(
        "new",
        4,
        skipped_layers=[1, 3],
        attention_period=3,
        layout_pattern="abc",
        time_step_rank=2,
        eos_token_id=[1, 2],
    )
    result, warnings = moved(config, [0, 1, 1, 2, 3], 4)
    assert {key for key in config for each in warnings if repr(key) in each} == {
        "skipped_layers",
        "attention_period",
        "layout_pattern",
    }
    assert result == config | {"num_hidden_layers": 5}
    _, warnings = moved({"model_type": "t5", "num_layers": 3}, [1, 2], 3)
    assert "relative_attention_bias" in warnings[0]


def test_layers_of_unlike_kinds_merged_into_one_are_named(tmp_path: Path) -> None:
    for name, pattern in (("a", 3), ("b", 2)):
        write_layers(tmp_path / name, sized("gemma3_text", 6, sliding_window_pattern=pattern))
    models = [{"model": "a"}, {"model": "b"}]
    plan = plan_merge(Recipe(merge_method="karcher", models=models), base_dir=tmp_path)
    (warning,) = [each for each in plan.warnings if "unlike kinds" in each]
    assert warning.startswith(
        f"layer 1 is merged from layers of unlike kinds: by 'layer_types', layer 1 of 'a' is '{S}'"
    )
    assert "layers 2, 3" in warning
    assert "layer_types" not in plan.config
    again = plan_merge(
        Recipe(merge_method="karcher", models=[models[0], {"model": "./a"}]), base_dir=tmp_path
    )
    assert not [each for each in again.warnings if "unlike" in each]


def test_tensors_with_a_part_per_layer_have_those_of_the_layers(tmp_path: Path) -> None:
    config = sized("gemma3n_text", 3, num_kv_shared_layers=0)
    axes = {"model.embed_tokens_per_layer.weight": 1, "model.per_layer_model_projection.weight": 0}
    sources, wanted = {}, {}
    for n, name in enumerate("ab"):
        sources[name] = {
            key: np.arange(30, dtype=np.float32).reshape((5, 6) if axis else (6, 5)) + 100 * n
            for key, axis in axes.items()
        }
        layers = {f"model.layers.{i}.w": np.full((2, 2), i, np.float32) for i in range(3)}
        write_model(tmp_path / name, sources[name] | layers, config=config)
    blocks = [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("b", 2)]
    for name, axis in axes.items():
        parts = {model: np.split(tensors[name], 3, axis) for model, tensors in sources.items()}
        wanted[name] = np.concatenate([parts[model][i] for model, i in blocks], axis)
    slices = [
        {"sources": [{"model": "a", "layer_range": [0, 2]}]},
        {"sources": [{"model": "b", "layer_range": [0, 3]}]},
    ]
    stacked = Recipe(merge_method="passthrough", slices=slices)
    merge(stacked, tmp_path / "out", base_dir=tmp_path)
    found = load_file(tmp_path / "out" / "model.safetensors")
    plan = plan_merge(stacked, base_dir=tmp_path)
    for name, expected in wanted.items():
        np.testing.assert_array_equal(found[name], expected)
        (source,) = next(job.sources for job in plan.jobs if job.name == name)
        for start in range(expected.size):
            piece = np.empty(min(7, expected.size - start), np.float32)
            source.read_into(start, piece)
            np.testing.assert_array_equal(piece, expected.reshape(-1)[start : start + piece.size])
    write_model(tmp_path / "b", layers, config=config)
    with pytest.raises(RecipeError, match=r"a part per layer, but model 'b', .* has none for its 3 layers"):
        plan_merge(stacked, base_dir=tmp_path)


@pytest.mark.parametrize("name", slow_except(["gemma3", "mistral"], OURS))
def test_moved_layers_give_the_recorded_logits(name: str, tmp_path: Path) -> None:
    source = write_ours(tmp_path / "source", name)
    merge(recipe(source, SLICES[name]), tmp_path / "out")
    expected = np.array(json.loads(RECORDED.read_text())["logits"][name])
    tokens = jnp.asarray(np.random.default_rng(1).integers(3, 61, (2, 12)), jnp.int32)

    def last() -> np.ndarray:
        model, params = load_model(tmp_path / "out")
        logits = jax.jit(lambda p: model.apply(p, tokens).logits)(params)
        return np.asarray(logits)[:, -1, :12]

    np.testing.assert_allclose(last(), expected, rtol=0, atol=1e-4)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert len(config.get("layer_types", order(name))) == config["num_hidden_layers"] == 7
    if config.pop("layer_types", None):  # the control: what was written before
        (tmp_path / "out" / "config.json").write_text(json.dumps(config))
        assert np.abs(last() - expected).max() > 1e-2
