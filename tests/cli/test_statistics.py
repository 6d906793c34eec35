"""`mergelab statistics` writes what the library computes, and says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mergelab import operators as ops
from mergelab.activations.merged_statistics import merged_grams
from mergelab.activations.statistics import gram
from mergelab.cli.main import cli
from mergelab.merging import Recipe, merge
from mergelab.models.load import load_model
from mergelab.models.save import save_model
from mergelab.models.table import stored_shapes
from tests.models.tiny_models import tiny, write

EVERY = ("--skip-positions", "0", "--keep-special", "--max-norm-multiple", "none")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("statistics")
    folder = write(place / "model", "llama")
    words = {f"w{i}": i for i in range(tiny("llama")[0].config.vocab_size)}
    tokenizer = {"version": "1.0", "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"pre_tokenizer": {"type": "Whitespace"}}))
    (place / "t.txt").write_text(" ".join(f"w{i % 40}" for i in range(90)))
    return place


def run(folder: Path, *options: str, status: int = 0) -> str:
    text = ["--text", str(folder / "t.txt"), "--out", str(folder / "out")]
    result = CliRunner().invoke(cli, ["statistics", str(folder / "model"), *text, *options])
    assert result.exit_code == status, (result.output, result.exception)
    return result.stdout if status == 0 else result.stderr


def test_a_gram_and_then_a_fisher_in_its_place(folder: Path) -> None:
    said = json.loads(run(folder, "--kind", "gram", "--context", "8", "--tokens", "50", *EVERY, "--json"))
    model, params = load_model(folder / "model")
    expected = gram(model, params, (np.arange(48) % 40).reshape(6, 8))
    assert said["tokens"] == expected.tokens == 48 and said["kind"] == "gram"
    stored = load_file(folder / "out" / "gram-00000.safetensors")
    assert len(stored) == said["tensors"] == sum(leaf.reads is not None for leaf in model.table())
    for name, ours in (("self_attn.v_proj", "attn.v"), ("mlp.down_proj", "mlp.down")):
        group, layer = ours.split(".")
        found = stored[f"model.layers.1.{name}.weight"]
        np.testing.assert_allclose(
            found, expected.tree["blocks_1"][group][layer]["kernel"], rtol=1e-5, atol=1e-6
        )

    usual = run(folder, "--kind", "gram", "--context", "8", "--tokens", "50", "--overwrite", "--json")
    assert json.loads(usual)["tokens"] == 40  # without the first of each context and two special ones
    with safe_open(folder / "out" / "gram-00000.safetensors", "np") as opened:
        assert json.loads(opened.metadata()["rule"])["skip_positions"] == 1
    assert "pass --overwrite" in run(folder, "--kind", "fisher", status=2)
    assert f"fisher of {len(stored_shapes(model.table()))} tensors on 64 tokens" in run(
        folder, "--kind", "fisher", "--overwrite"
    )
    assert [file.name for file in sorted((folder / "out").glob("*"))] == [
        "fisher.safetensors",
        "mergelab.json",
    ]
    with safe_open(folder / "out" / "fisher.safetensors", "np") as opened:
        assert opened.metadata() == {"kind": "fisher", "tokens": "64"}


def test_grams_behind_merged_blocks_are_merged_by_a_recipe(folder: Path, tmp_path: Path) -> None:
    model, params = load_model(folder / "model")
    other = jax.tree.map(lambda x: x * 1.1, params)
    save_model(model, other, tmp_path / "b" / "model")
    shutil.copy(folder / "model" / "tokenizer.json", tmp_path / "b" / "model")
    (tmp_path / "u.txt").write_text(" ".join(f"w{(3 * i) % 40}" for i in range(90)))
    places = [folder / "model", tmp_path / "b" / "model"]
    texts = [
        "--text",
        folder / "t.txt",
        "--text",
        tmp_path / "u.txt",
        "--context",
        "8",
        "--kind",
        "merged_gram",
    ]
    command = ["statistics", *places, *texts, "--out", tmp_path / "stats", *EVERY, "--json"]
    result = CliRunner().invoke(cli, [str(word) for word in command])
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "stats").glob("model-*")) == ["model-0", "model-1"]
    contexts = [(np.arange(90) * step % 40)[:88].reshape(11, 8) for step in (1, 3)]
    found = merged_grams(model, [params, other], contexts)
    models = [
        {"model": str(place), "statistics": str(tmp_path / "stats" / f"model-{i}")}
        for i, place in enumerate(places)
    ]
    merge(Recipe(merge_method="regmean_pp", models=models, dtype="float32"), tmp_path / "out")
    _, merged = load_model(tmp_path / "out")
    expected = ops.regmean_pp()([params, other], statistics=[one.tree for one in found])
    for one, two in zip(jax.tree.leaves(merged), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-4)
    told = CliRunner().invoke(cli, [str(word) for word in [*command[:2], *texts, "--out", tmp_path / "x"]])
    assert told.exit_code == 2 and "found 1 and 2" in told.stderr


def test_weights_that_are_not_finite_are_named(folder: Path) -> None:
    weights = load_file(folder / "model" / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = np.inf
    save_file(weights, folder / "model" / "model.safetensors")
    told = run(folder, "--kind", "gram", "--overwrite", status=2)
    assert "not finite" in told and (folder / "out" / "fisher.safetensors").is_file()
