"""Layers that predict further tokens: merged like others, copied where others lack them, numbered on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from mergelab.merging import merge
from mergelab.merging.plan.planner import plan_merge

CONFIG = {"model_type": "deepseek_v3", "hidden_size": 4, "num_hidden_layers": 2, "vocab_size": 6}


def write(folder: Path, seed: int, further: int, **config: Any) -> dict[str, np.ndarray]:
    """A model of two layers with `further` layers behind them."""
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (6, 4), "model.norm.weight": (4,), "lm_head.weight": (6, 4)}
    shapes |= {f"model.layers.{i}.mlp.up_proj.weight": (8, 4) for i in range(2 + further)}
    shapes |= {f"model.layers.{2 + i}.eh_proj.weight": (4, 8) for i in range(further)}
    shapes |= {f"model.layers.{2 + i}.embed_tokens.weight": (6, 4) for i in range(further)}
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_nextn_predict_layers": 1, **config}))
    return tensors


def merged(tmp_path: Path, recipe: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any], str]:
    path, out = tmp_path / "recipe.yml", tmp_path / "out"
    path.write_text(yaml.safe_dump({"dtype": "float32", **recipe}))
    said = " ".join(plan_merge(path).warnings)
    merge(path, out)
    return load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text()), said


def half(*folders: Path) -> dict[str, Any]:
    models = [{"model": str(folder), "parameters": {"weight": 0.5}} for folder in folders]
    return {"merge_method": "linear", "models": models}


def test_they_are_merged_where_all_have_them(tmp_path: Path) -> None:
    a, b = (write(tmp_path / name, seed, 1) for seed, name in enumerate("ab"))
    found, config, said = merged(tmp_path, half(tmp_path / "a", tmp_path / "b"))
    assert found.keys() == a.keys() and config["num_nextn_predict_layers"] == 1
    for name in a:
        np.testing.assert_allclose(found[name], (a[name] + b[name]) / 2, atol=1e-6)
    assert "further tokens" not in said


@pytest.mark.parametrize("order", ["an", "na"])
def test_they_are_copied_where_others_lack_them(order: str, tmp_path: Path) -> None:
    tensors = {name: write(tmp_path / name, seed, name == "a") for seed, name in enumerate("an")}
    found, config, said = merged(tmp_path, half(*(tmp_path / name for name in order)))
    assert found.keys() == tensors["a"].keys() and config["num_hidden_layers"] == 2
    for name in found:
        expected = (
            tensors["a"][name] if ".layers.2." in name else (tensors["a"][name] + tensors["n"][name]) / 2
        )
        np.testing.assert_allclose(found[name], expected, atol=1e-6)
    assert "3 tensors of layers that predict further tokens" in said and "copied from" in said


def test_they_stand_behind_the_last_layer_of_a_longer_model(tmp_path: Path) -> None:
    tensors = write(tmp_path / "a", 0, 1)
    slices = [{"sources": [{"model": str(tmp_path / "a"), "layer_range": [start, 2]}]} for start in (0, 1)]
    found, config, _ = merged(tmp_path, {"merge_method": "passthrough", "slices": slices})
    assert config["num_hidden_layers"] == 3
    np.testing.assert_array_equal(
        found["model.layers.3.eh_proj.weight"], tensors["model.layers.2.eh_proj.weight"]
    )
    np.testing.assert_array_equal(
        found["model.layers.2.mlp.up_proj.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    )
    assert not any(name.startswith("model.layers.2.e") for name in found)


def test_without_the_config_saying_so_they_are_layers(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        write(tmp_path / name, seed, 1, num_nextn_predict_layers=0, num_hidden_layers=3)
    found, config, _ = merged(tmp_path, half(tmp_path / "a", tmp_path / "b"))
    assert config["num_hidden_layers"] == 3 and "model.layers.2.eh_proj.weight" in found
