"""The worked examples of CONTRIBUTING.md: an operator and an SAE variant, added as the page says."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mergelab as ml


@pytest.fixture
def example(repository: Path, tmp_path: Path, request: pytest.FixtureRequest) -> ModuleType:
    """The example under a heading, as the one file that the page asks for."""
    page = (repository / "CONTRIBUTING.md").read_text("utf-8")
    code = re.search(rf"^### {request.param}\n.*?^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    assert code is not None
    file = tmp_path / "example.py"
    file.write_text(code[1])
    spec = importlib.util.spec_from_file_location("contributed_example", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


def write_models(folder: Path) -> dict[str, np.ndarray]:
    """Three folders with one matrix each; returns the matrices."""
    rng, found = np.random.default_rng(0), {}
    for name in ("base", "code", "prose"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text('{"model_type": "llama"}')
        found[name] = rng.normal(size=(6, 10)).astype(np.float32)
        save_file({"lm_head.weight": found[name]}, folder / name / "model.safetensors")
    return found


@pytest.mark.parametrize("example", ["A merge operator"], indirect=True)
def test_an_operator_is_one_file_and_its_line(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = write_models(tmp_path)
    (tmp_path / "recipe.yaml").write_text(
        "merge_method: trimmed_mean\nbase_model: base\nmodels: [{model: code}, {model: prose}]\n"
        "parameters: {density: 0.3}\n"
    )
    with pytest.raises(ml.errors.RecipeError, match="trimmed_mean"):
        ml.merge(tmp_path / "recipe.yaml", tmp_path / "none")
    operator = example.trimmed_mean
    monkeypatch.setitem(ml.operators.OPERATORS, operator.name, operator)  # its line in operators/__init__.py

    ml.merge(tmp_path / "recipe.yaml", tmp_path / "merged")
    streamed = load_file(tmp_path / "merged" / "model.safetensors")["lm_head.weight"]
    trees = [{"lm_head.weight": models[name]} for name in ("code", "prose")]
    in_memory = operator(density=0.3)(trees, base={"lm_head.weight": models["base"]})["lm_head.weight"]
    np.testing.assert_allclose(streamed, in_memory, atol=1e-6)

    deltas = np.stack([models[name] - models["base"] for name in ("code", "prose")])
    least = np.sort(np.abs(deltas).reshape(2, -1), axis=1)[:, -18]  # 0.3 of 60 entries
    by_hand = models["base"] + np.where(np.abs(deltas) >= least[:, None, None], deltas, 0).mean(0)
    np.testing.assert_allclose(streamed, by_hand, atol=1e-6)
    assert np.abs(streamed - models["base"] - deltas.mean(0)).max() > 0.1


@pytest.mark.parametrize("example", ["A variant of a sparse autoencoder"], indirect=True)
def test_a_variant_is_one_file_and_its_line(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).normal(size=(64, 8))
    options: dict[str, Any] = {"n_latents": 16, "k": 4, "steps": 3, "batch_size": 32}
    with pytest.raises(ml.errors.SAEError, match="growing_topk"):
        ml.train_sae(rows, variant="growing_topk", **options)
    variants: Any = ml.sae.VARIANTS
    monkeypatch.setitem(variants, "growing_topk", example.GrowingTopK)  # its line in variants/__init__.py
    active: list[float] = []
    sae = ml.train_sae(
        rows, variant="growing_topk", progress=lambda *said: active.append(said[2]["l0"]), **options
    )
    assert sae.config.k == 4 and sae.config.metadata["variant"] == "growing_topk"
    assert 2 < active[-1] <= 4
