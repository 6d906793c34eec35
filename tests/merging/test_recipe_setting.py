"""Parameter values: gradients, filters and scopes, worked out by hand from the specification."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergelab.errors import RecipeError
from mergelab.merging.recipe.schema import Recipe
from mergelab.merging.recipe.scopes import resolve, scoped_parts
from mergelab.merging.recipe.settings import UNSET, Unset, parse_setting
from mergelab.operators import OPERATORS

numbers = st.lists(st.floats(-10, 10), min_size=1, max_size=6)


@pytest.mark.parametrize(
    ("written", "name", "t", "expected"),
    [
        (0.5, "x", 0.3, 0.5),
        ([0.0, 1.0], "x", 0.25, 0.25),
        ([0, 1, 0], "x", 0.25, 0.5),
        ([0, 1, 0], "x", 0.5, 1.0),
        ([0, 1, 0], "x", 1.0, 0.0),
        ([0.2, 0.8], "x", 0.0, 0.2),
        ([7], "x", 1.0, 7),
        ([True, False], "x", 0.99, True),
        ([True, False], "x", 1.0, False),
        (["a", "b", "c"], "x", 0.5, "b"),
        ([{"filter": "mlp", "value": 1}, {"value": 2}], "layers.0.mlp.up", 0, 1),
        ([{"filter": "mlp", "value": 1}, {"value": 2}], "layers.0.attn.q", 0, 2),
        ([{"filter": "*", "value": 1}, {"filter": "mlp", "value": 2}], "layers.0.mlp.up", 0, 1),
        ([{"filter": "q", "value": [0, 4]}], "attn.q", 0.75, 3.0),
        ({"filter": "q", "value": 3}, "attn.q", 0, 3),
        ({"value": None}, "x", 0, None),
    ],
)
def test_values_by_hand(written: Any, name: str, t: float, expected: Any) -> None:
    assert parse_setting(written).evaluate(name, t) == expected


@pytest.mark.parametrize("written", [[{"filter": "mlp", "value": 1}], []])
def test_what_says_nothing_is_unset(written: Any) -> None:
    assert isinstance(parse_setting(written).evaluate("attn", 0.5), Unset)
    assert repr(UNSET) == "UNSET"


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ({"filter": "a"}, "'value' is missing"),
        ({"filter": "a", "valeu": 1}, "unknown key 'valeu'"),
        ([{"value": 1}, 3], "entry 2: expected {filter, value}"),
        ([{"filter": 3, "value": 1}], "'filter' must be a part of a tensor name"),
        ([[1, 2], 3], "expected a value"),
    ],
)
def test_malformed_settings_are_named(written: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("{", r"\{").replace("}", r"\}")):
        parse_setting(written)


@given(values=numbers, t=st.floats(0, 1))
def test_gradients_stay_between_their_values(values: list[float], t: float) -> None:
    found = parse_setting(values).evaluate("any", t)
    assert isinstance(found, float | int)
    assert min(values) - 1e-9 <= found <= max(values) + 1e-9


@given(values=numbers)
def test_gradients_pass_through_their_knots(values: list[float]) -> None:
    setting, last = parse_setting(values), len(values) - 1
    assert setting.evaluate("any", 0.0) == values[0]
    assert setting.evaluate("any", 1.0) == pytest.approx(values[-1] if last else values[0])
    assert parse_setting(setting.to_data()) == setting


@given(a=st.floats(-5, 5), b=st.floats(-5, 5), t=st.floats(0, 1))
def test_two_values_are_a_straight_line(a: float, b: float, t: float) -> None:
    assert parse_setting([a, b]).evaluate("any", t) == pytest.approx((1 - t) * a + t * b)


def arguments(
    recipe: Recipe, name: str = "layers.0.mlp.up", t: float = 0.0, module: str | None = None
) -> Any:
    operator = OPERATORS[recipe.merge_method]
    piece = scoped_parts(recipe, operator)[module][0]
    return resolve(operator, piece, [(source, name) for source in piece.inputs], name, t)


def test_scopes_go_from_the_model_outwards() -> None:
    recipe = Recipe(
        merge_method="ties",
        base_model="base",
        modules={
            "text": {
                "parameters": {"density": 0.3, "lambda": 0.7},
                "slices": [
                    {
                        "sources": [
                            {"model": "base", "layer_range": [0, 2]},
                            {"model": "a", "layer_range": [0, 2], "parameters": {"weight": 5, "lambda": 9}},
                            {"model": "b", "layer_range": [0, 2]},
                        ],
                        "parameters": {"density": [{"filter": "attn", "value": 0.2}]},
                    }
                ],
            }
        },
        parameters={"weight": 1, "normalize": False, "density": 0.4, "lambda": 0.1},
    )
    here = arguments(recipe, "layers.0.mlp.up", module="text")
    assert here == {"weight": [5.0, 1.0], "density": [0.3, 0.3], "lambda_": 0.7, "normalize": False}
    assert arguments(recipe, "layers.0.attn.q", module="text")["density"] == [0.2, 0.2]


def test_the_base_has_no_parameters_unless_it_is_an_input() -> None:
    models = [{"model": "base", "parameters": {"weight": 3}}, {"model": "a", "parameters": {"weight": 1}}]
    ties = Recipe(merge_method="ties", base_model="base", models=models)
    linear = Recipe(merge_method="linear", base_model="base", models=models)
    assert arguments(ties)["weight"] == [1.0]
    assert arguments(linear)["weight"] == [3.0, 1.0]


def test_an_unlisted_base_comes_last() -> None:
    recipe = Recipe(
        merge_method="linear",
        base_model="z",
        models=[{"model": "a", "parameters": {"weight": 2}}],
        parameters={"weight": 7},
    )
    (piece,) = scoped_parts(recipe, OPERATORS["linear"])[None]
    assert [source.model for source in piece.inputs] == ["a", "z"]
    assert arguments(recipe)["weight"] == [2.0, 7.0]


def test_per_model_filters_look_at_the_inputs_name_and_shared_ones_at_the_outputs() -> None:
    recipe = Recipe(
        merge_method="task_arithmetic",
        base_model="base",
        models=[{"model": "a", "parameters": {"weight": [{"filter": "layers.7", "value": 1}, {"value": 2}]}}],
        parameters={"lambda": [{"filter": "layers.0", "value": 3}, {"value": 4}]},
    )
    operator = OPERATORS["task_arithmetic"]
    (piece,) = scoped_parts(recipe, operator)[None]
    found = resolve(operator, piece, [(piece.inputs[0], "layers.7.mlp")], "layers.0.mlp", 0.0)
    assert found == {"weight": [1.0], "lambda_": 3.0}


def test_passthrough_reads_the_scale_of_its_one_model() -> None:
    scale = [{"filter": "o_proj", "value": 0.0}, {"value": 1.5}]
    recipe = Recipe(merge_method="passthrough", models=[{"model": "a", "parameters": {"scale": scale}}])
    assert arguments(recipe, "o_proj.weight")["scale"] in (0.0, [0.0])
    assert arguments(recipe, "q_proj.weight")["scale"] in (1.5, [1.5])


def test_a_required_parameter_no_filter_matches_is_named_with_its_tensor() -> None:
    recipe = Recipe(
        merge_method="linear",
        models=[{"model": "a", "parameters": {"weight": [{"filter": "attn", "value": 1}]}}],
    )
    with pytest.raises(
        RecipeError, match=r"'layers\.0\.mlp\.up' of model 'a': no filter of 'weight' matches"
    ):
        arguments(recipe)


def test_whole_numbers_stay_whole() -> None:
    recipe = Recipe(merge_method="karcher", models=[{"model": "a"}], parameters={"max_iter": [4, 8]})
    assert arguments(recipe, t=0.5)["max_iter"] == 6
    with pytest.raises(RecipeError, match="must be whole"):
        arguments(recipe, t=0.3)
