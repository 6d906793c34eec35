"""Warnings that a plan gives from the recipe's numbers and a few values of each model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergelab.merging.plan.planner import plan_merge
from mergelab.merging.recipe.recipe_file import load_recipe, parse_recipe
from mergelab.merging.recipe.schema import Recipe
from tests.merging.recipes import write_model

SHAPES = {"model.embed_tokens.weight": (20, 16), "model.norm.weight": (16,)} | {
    f"model.layers.{i}.{name}.weight": (16, 16) for i in range(3) for name in ("attn", "mlp")
}


def family(folder: Path, **changes: float) -> None:
    """A base, and models that differ from it by `changes` standard deviations; None of kin if infinite."""
    rng = np.random.default_rng(0)
    base = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
    for name, change in {"base": 0.0, **changes}.items():
        delta = {tensor: rng.standard_normal(x.shape) for tensor, x in base.items()}
        tensors = delta if np.isinf(change) else {t: x + change * delta[t] for t, x in base.items()}
        write_model(folder / name, {t: x.astype(np.float32) for t, x in tensors.items()})


def warnings(folder: Path, method: str, *models: str, **parameters: Any) -> str:
    base = {"base_model": "base"} if "base" not in models else {}
    recipe = Recipe(merge_method=method, models=[{"model": m} for m in models], parameters=parameters, **base)
    return "\n".join(plan_merge(recipe, base_dir=folder).warnings)


STRONG = [
    ("wise_ft", {"alpha": 1.6}, "1.6-fold, by alpha"),
    ("wise_ft", {"alpha": -1.6}, "-1.6-fold, by alpha"),
    ("slerp", {"t": 2.0}, "2-fold, by t"),
    ("task_arithmetic", {"weight": 2.0}, "2-fold, by weight"),
    ("task_arithmetic", {"weight": 1.0, "lambda": 1.8}, "1.8-fold, by weight and lambda"),
    ("ties", {"weight": 0.5, "lambda": 1.8}, "1.8-fold"),
    ("task_arithmetic", {"weight": [0.0, 1.0, 2.0]}, "enters tensor 'model.layers.2.attn.weight'|2 tensors"),
    ("dare_ties", {"weight": 1.7, "density": 0.5}, "1.7-fold"),
]
MILD = [
    ("wise_ft", {"alpha": 1.5}),
    ("slerp", {"t": 0.5}),
    ("task_arithmetic", {"weight": 1.0}),
    ("task_arithmetic", {"weight": 5.0, "normalize": True}),
    ("ties", {"weight": 3.0}),
    ("task_arithmetic", {"weight": 3.0, "lambda": 0.3}),
    ("ramplus_tl", {"alpha": 2.0}),
]


@pytest.mark.parametrize(("method", "parameters", "message"), STRONG)
def test_a_model_that_enters_more_than_one_and_a_half_times_is_warned_of(
    method: str, parameters: dict[str, Any], message: str, tmp_path: Path
) -> None:
    family(tmp_path, a=0.1)
    import re

    assert re.search(message, warnings(tmp_path, method, "a", **parameters))


@pytest.mark.parametrize(("method", "parameters"), MILD)
def test_what_stays_within_is_not(method: str, parameters: dict[str, Any], tmp_path: Path) -> None:
    family(tmp_path, a=0.1)
    assert warnings(tmp_path, method, "a", **parameters) == ""


def test_shares_count_where_weights_are_normalized(tmp_path: Path) -> None:
    family(tmp_path, a=0.1, b=0.1)

    def linear(*weights: float, **more: Any) -> str:
        models = [{"model": m, "parameters": {"weight": w}} for m, w in zip("ab", weights, strict=True)]
        recipe = Recipe(merge_method="linear", models=models, parameters=more)
        return "\n".join(plan_merge(recipe, base_dir=tmp_path).warnings)

    assert linear(30, 10) == ""
    assert "model 'a' enters" in linear(3, -2)
    assert "model 'a' enters" in linear(30, 1, normalize=False)
    assert linear(1, 1, normalize=False) == ""


def test_a_model_of_another_origin_is_named(tmp_path: Path) -> None:
    family(tmp_path, a=0.1, b=0.5, stranger=np.inf)
    found = warnings(tmp_path, "task_arithmetic", "a", "stranger", weight=1)
    assert "model 'stranger' does not seem to descend from the base 'base'" in found
    assert "'a' does not" not in found
    assert warnings(tmp_path, "task_arithmetic", "a", "b", weight=1) == ""
    assert "model 'stranger' does not" in warnings(tmp_path, "linear", "a", "stranger", weight=1)


@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
@pytest.mark.parametrize("siblings", ["ab", "abc"])
def test_a_sibling_sixty_times_as_far_from_the_base_is_named(
    siblings: str, method: str, tmp_path: Path
) -> None:
    family(tmp_path, a=0.01, b=0.6, c=0.012, d=0.05)
    found = warnings(tmp_path, method, *siblings, weight=0.3)
    assert "the change of model 'b' is" in found
    assert warnings(tmp_path, method, "a", "c", "d", weight=0.3) == "", "5 times is not an outlier"


def test_of_three_models_without_a_base_the_median_shows_which_is_far(tmp_path: Path) -> None:
    family(tmp_path, a=0.01, b=0.6, c=0.01)
    recipe = Recipe(merge_method="linear", models=[{"model": m} for m in "abc"], parameters={"weight": 1})
    (one,) = plan_merge(recipe, base_dir=tmp_path).warnings
    assert "the change of model 'b' is" in one


def test_layers_of_other_places_and_results_to_come_are_not_compared(tmp_path: Path) -> None:
    family(tmp_path, a=0.1)
    crossed = (
        "merge_method: linear\nparameters: {weight: 1}\nslices:\n"
        "- sources: [{model: base, layer_range: [0, 2]}, {model: a, layer_range: [1, 3]}]\n"
    )
    assert not any("descend" in w for w in plan_merge(parse_recipe(crossed), base_dir=tmp_path).warnings)
    graph = (
        "name: first\nmerge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a}]\n---\n"
        "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: first}, {model: base}]\n"
    )
    assert plan_merge(parse_recipe(graph), base_dir=tmp_path).warnings == ()


def test_the_recorded_family_is_of_one_origin(goldens: Path) -> None:
    for case in ("task_arithmetic_default", "linear_nonorm", "ties_nonuniform", "nuslerp_base", "gpt2_slerp"):
        plan = plan_merge(load_recipe(goldens / "recipes" / case / "config.yaml"), base_dir=goldens)
        assert plan.warnings == (), case
