"""Statistics in recipes: `statistics:` beside a model, from its faults to the merged file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mergelab.errors import OutputError, RecipeError
from mergelab.merging import Recipe, merge
from mergelab.merging.recipe.recipe_file import parse_recipe, recipe_yaml
from tests.merging.recipes import write_model

NAME = "model.layers.0.attn.weight"


def gram(seed: int, width: int = 4) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((50, width)).astype(np.float32)
    return x.T @ x / np.float32(50)


def write_statistics(
    folder: Path, tensors: dict[str, np.ndarray], kind: str = "gram", file: str = "statistics.safetensors"
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / file, metadata={"kind": kind, "tokens": "50"})


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Models `a` and `b`, and Gram matrices of their blocks' matrices."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        write_model(tmp_path / name, seed=seed)
        blocks = [f"model.layers.{i}.{part}.weight" for i in range(3) for part in ("attn", "mlp")]
        half = {block: gram(10 * i + seed) for i, block in enumerate(blocks[:3])}
        rest = {block: gram(10 * i + seed) for i, block in enumerate(blocks[3:], start=3)}
        write_statistics(tmp_path / "stats" / name, half, file="one.safetensors")
        write_statistics(tmp_path / "stats" / name, rest, file="two.safetensors")
    return tmp_path


def recipe(method: str = "regmean", **fields: Any) -> Recipe:
    models = [{"model": name, "statistics": f"stats/{name}"} for name in "ab"]
    return Recipe(**({"merge_method": method, "models": models} | fields))


def weights(here: Path, folder: str) -> dict[str, np.ndarray]:
    return load_file(here / folder / "model.safetensors")


def test_a_recipe_merges_by_statistics_and_averages_what_has_none(here: Path) -> None:
    plan = merge(recipe(), "out").plan
    a, b, out = (weights(here, name) for name in ("a", "b", "out"))
    first, second = gram(0).astype(np.float64), gram(1).astype(np.float64)
    expected = (a[NAME] @ first + b[NAME] @ second) @ np.linalg.inv(first + second)
    np.testing.assert_allclose(out[NAME], expected, atol=1e-5)
    assert np.abs(expected - (a[NAME] + b[NAME]) / 2).max() > 0.1
    for name in ("model.embed_tokens.weight", "model.layers.0.norm.weight"):
        np.testing.assert_allclose(out[name], (a[name] + b[name]) / 2, rtol=1e-6)
    jobs = {job.name: job for job in plan.jobs}
    assert jobs[NAME].bytes_in == 2 * (a[NAME].nbytes + 4 * 4 * 4)
    assert {path.parent.parent.name for path in plan.inputs} >= {"stats"}


def test_paths_are_looked_up_from_the_recipes_folder_and_a_file_will_do(here: Path) -> None:
    (here / "recipes").mkdir()
    text = recipe_yaml(recipe()).replace("stats/b", str(here / "all.safetensors"))
    both = [load_file(here / "stats" / "b" / f"{n}.safetensors") for n in ("one", "two")]
    save_file(both[0] | both[1], here / "all.safetensors")
    (here / "stats").rename(here / "recipes" / "stats")
    (here / "recipes" / "r.yaml").write_text(text)
    merge(here / "recipes" / "r.yaml", "out")
    assert np.isfinite(weights(here, "out")[NAME]).all()
    assert parse_recipe(text).models == parse_recipe(recipe_yaml(parse_recipe(text))).models


def test_fishers_weigh_entries_and_another_statistic_is_another_merge(here: Path) -> None:
    rng = np.random.default_rng(0)
    fishers = [rng.random((4, 4)).astype(np.float32) for _ in range(3)]
    for name, fisher in zip("ab", fishers, strict=False):
        write_statistics(here / "f" / name, {NAME: fisher}, "fisher")
    models = [
        {"model": n, "statistics": f"f/{n}", "parameters": {"weight": w}} for n, w in (("a", 2), ("b", 1))
    ]
    made = Recipe(merge_method="fisher", models=models, parameters={"floor": 0.5})
    first = merge(made, "out").plan.identity
    a, b, out = (weights(here, name)[NAME] for name in ("a", "b", "out"))
    trust = [2 * (fishers[0] + 0.5), fishers[1] + 0.5]
    np.testing.assert_allclose(out, (trust[0] * a + trust[1] * b) / sum(trust), rtol=1e-5, atol=1e-6)
    write_statistics(here / "f" / "b", {NAME: fishers[2]}, "fisher")
    assert merge(made, "again").plan.identity != first


def test_layers_that_move_take_their_own_statistics_along(here: Path) -> None:
    ranges = [[1, 2], [0, 1]]
    slices = [
        {"sources": [{"model": n, "layer_range": r, "statistics": f"stats/{n}"} for n in "ab"]}
        for r in ranges
    ]
    merge(recipe(models=None, slices=slices), "moved")
    merge(recipe(), "out")
    moved, out = weights(here, "moved"), weights(here, "out")
    np.testing.assert_array_equal(moved[NAME.replace(".0.", ".1.")], out[NAME])
    np.testing.assert_array_equal(moved[NAME], out[NAME.replace(".0.", ".1.")])


def test_square_kernels_of_gpt2_read_along_their_first_axis(here: Path) -> None:
    config = {"model_type": "gpt2", "vocab_size": 6, "n_embd": 4, "n_layer": 1, "n_head": 2}
    block = "transformer.h.0"
    shapes = {f"{block}.attn.c_proj.weight": (4, 4), f"{block}.mlp.c_fc.weight": (4, 16)}
    rng = np.random.default_rng(0)
    for seed, name in enumerate("ab"):
        tensors = {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
        write_model(here / name, tensors, config=config)
        write_statistics(here / "g" / name, {k: gram(seed) for k in shapes})
    models = [{"model": name, "statistics": f"g/{name}"} for name in "ab"]
    merge(Recipe(merge_method="regmean", models=models), "out")
    inverse = np.linalg.inv(gram(0).astype(np.float64) + gram(1))
    for key in shapes:
        a, b, out = (weights(here, folder)[key] for folder in ("a", "b", "out"))
        np.testing.assert_allclose(out, inverse @ (gram(0) @ a + gram(1) @ b), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge_method": "linear", "parameters": {"weight": 1}}, r"statistics: 'linear' takes no"),
        ({"models": [{"model": "a"}, {"model": "b", "statistics": "stats/b"}]},
         r"models\[0\]: 'regmean' needs statistics of model 'a'.*--kind gram"),
        ({"models": [{"model": "a", "statistics": "stats/c"}]},
         r"models\[0\].statistics: statistics 'stats/c' do not exist: looked in"),
        ({"models": [{"model": "a", "statistics": "a"}]}, None),
        ({"models": [{"model": "a", "statistics": " "}]}, "names no folder"),
        ({"models": [{"model": "a", "statistics": "wrong"}]}, "'wrong' name no tensor of model 'a'.*'other'"),
        ({"models": [{"model": "a", "statistics": "empty"}]}, r"expected \*.safetensors in it"),
        ({"models": [{"model": "a", "statistics": "odd"}]},
         rf"tensor '{NAME}' of model 'a' is \[3, 3\], but the Gram matrix of a tensor \[4, 4\] is \[4, 4\]"),
        ({"models": [{"model": "a", "statistics": "fishers"}]}, "kind 'fisher', but 'regmean' takes 'gram'"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_statistics_is_said_in_one_sentence(
    here: Path, change: dict[str, Any], message: str | None
) -> None:
    write_statistics(here / "wrong", {"other": gram(0)})
    write_statistics(here / "odd", {NAME: gram(0, width=3)})
    write_statistics(here / "fishers", {NAME: gram(0)}, kind="fisher")
    (here / "empty").mkdir()
    with pytest.raises(RecipeError, match=message):
        merge(recipe(**change), "out")
    assert not (here / "out").exists()


def test_statistics_of_the_base_are_never_read_and_no_output_replaces_any(here: Path) -> None:
    plan = merge(recipe(base_model="a"), "out").plan  # one model besides the base
    assert any("models[0].statistics: is never read for the base" in warning for warning in plan.warnings)
    with pytest.raises(OutputError, match="stats"):
        merge(recipe(), here / "stats" / "a", overwrite=True)
