"""The strict YAML reader: YAML 1.2 scalars, line numbers, anchors with bounds; and recipes through it."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mergelab.checkpoints.yaml_data import parse_yaml
from mergelab.errors import RecipeError
from mergelab.merging.recipe.recipe_file import load_recipe, parse_documents, parse_recipe, recipe_yaml
from mergelab.merging.recipe.schema import Recipe, TokenSource


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("5.", 5.0),
        ("-3", -3),
        ("+3", 3),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("'1'", "1"),
        ('"true"', "true"),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("-.inf", float("-inf")),
        ("1" * 50, float("1" * 50)),
    ],
)
def test_scalars_are_those_of_yaml_1_2(written: str, value: Any) -> None:
    (document,) = parse_yaml(f"x: {written}", "x.yaml")
    assert document.data == {"x": value}
    assert type(document.data["x"]) is type(value)


@pytest.mark.parametrize(
    "written",
    ["010", "-010", "0_7", "00", "08", "0b101", "-0b1_1", "0x1F", "-0x_1f", "1:30", "-1:30", "+1:0:0.5",
     "1:60", "12:30:45", "190:20:30.15", "0", "1_0:30", "'010'", "0o17", "a:30"],
)  # fmt: skip
def test_numbers_of_recipes_are_those_of_yaml_1_1(written: str) -> None:
    """As PyYAML reads them, and with it mergekit; what it takes for text is read as elsewhere."""
    theirs = yaml.safe_load(written)
    (document,) = parse_documents(f"x: {written}")
    (elsewhere,) = parse_yaml(f"x: {written}", "x.yaml")
    ours = document.data["x"]
    assert ours == (elsewhere.data["x"] if isinstance(theirs, str) else theirs)
    differs = ours != elsewhere.data["x"]
    assert document.old_numbers == ([(("x",), written, theirs)] if differs else [])
    assert not elsewhere.old_numbers


@pytest.mark.parametrize("written", ["0b_", "0x_", "0" * 60, "1:30" + ":00" * 20])
def test_what_is_no_number_of_yaml_1_1_is_no_error(written: str) -> None:
    assert parse_documents(f"x: {written}")[0].old_numbers == []


def test_lines_are_known_for_every_field() -> None:
    (document,) = parse_documents("a: 1\nb:\n  - c: 2\n  - d:\n      e: 3\n")
    assert document.lines == {(): 1, ("a",): 1, ("b",): 2, ("b", 0): 3, ("b", 0, "c"): 3} | {
        ("b", 1): 4,
        ("b", 1, "d"): 4,
        ("b", 1, "d", "e"): 5,
    }


def test_anchors_and_merge_keys_work() -> None:
    (document,) = parse_documents(
        "x: &p {w: 1, d: 2}\ny: *p\nz: {<<: *p, d: 3}\nl: {<<: [*p, {w: 9, q: 4}]}\n"
    )
    assert document.data["y"] == {"w": 1, "d": 2}
    assert document.data["z"] == {"w": 1, "d": 3}
    assert document.data["l"] == {"w": 1, "d": 2, "q": 4}


def test_a_billion_laughs_are_refused_quickly() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    with pytest.raises(RecipeError, match=r"aliases expand to more than 100,000 values"):
        parse_documents("\n".join(lines))


@pytest.mark.parametrize("text", ["[" * 5000, "{a: " * 5000, "- " * 5000])
def test_depth_is_bounded(text: str) -> None:
    with pytest.raises(RecipeError, match=r"nested too deeply|not valid YAML"):
        parse_documents(text)


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused_in_a_sentence(text: str) -> None:
    try:
        parse_documents(text)
    except RecipeError as error:
        assert str(error).startswith("recipe:")


def test_the_whole_grammar_round_trips() -> None:
    recipe = parse_recipe(
        """merge_method: dare_ties
base_model: org/base@main
dtype: float32
out_dtype: bfloat16
tokenizer:
  source: union
  pad_to_multiple_of: 64
  tokens:
    <a>: {source: other, force: true}
    '1': {source: {kind: zero}}
    b: {source: {kind: model_token, model: other, token_id: 7}}
    c:
chat_template: auto
modules:
  text:
    slices:
    - base_model: org/base@main
      residual_weight: 0.1
      sources:
      - {model: org/base@main, layer_range: [0, 2]}
      - {model: x@r+y@s, layer_range: [2, 4], parameters: {weight: [0, 1], density: {filter: a, value: 0.5}}}
      parameters: {weight: 1}
    parameters:
  vision:
    models: [{model: x@r+y@s, parameters: {weight: [{filter: q, value: [0, 1]}, {value: 2}]}}]
parameters: {int8_mask: true, lambda: 1e-1}
""".replace("    c:\n", "    c: {}\n")
    )
    again = parse_recipe(recipe_yaml(recipe))
    assert again == recipe
    assert recipe_yaml(again) == recipe_yaml(recipe)
    assert recipe.tokenizer is not None
    assert recipe.tokenizer.tokens["b"].source == TokenSource(kind="model_token", model="other", token_id=7)
    assert set(recipe.tokenizer.tokens) == {"<a>", "1", "b", "c"}
    assert list(recipe.model_texts()) == ["org/base@main", "x@r+y@s"]
    assert list(recipe.referenced()) == ["org/base@main", "x@r+y@s", "other"]


def test_python_builds_the_same_object() -> None:
    parsed = parse_recipe(
        "merge_method: ties\nbase_model: b\n"
        "models:\n- {model: a, parameters: {weight: 1, density: [0.2, 0.5]}}\n"
    )
    built = Recipe(
        merge_method="ties",
        base_model="b",
        models=[{"model": "a", "parameters": {"weight": 1, "density": [0.2, 0.5]}}],
    )
    assert built == parsed
    assert built != Recipe(merge_method="ties", base_model="c", models=built.models)


def test_every_recorded_recipe_is_read_and_round_trips(goldens) -> None:
    files = sorted(goldens.glob("recipes/*/config.yaml"))
    assert len(files) > 40
    for file in files:
        recipe = load_recipe(file)
        assert parse_recipe(recipe_yaml(recipe)) == recipe
        assert recipe.origin.folder == file.parent.resolve()


LINEAR = "merge_method: linear\nparameters: {weight: 1}\nmodels: "


def test_documents_become_one_recipe_in_running_order() -> None:
    text = (
        f"name: top\n{LINEAR}[{{model: mid}}, {{model: low+lora}}]\n---\n"
        f"name: mid\n{LINEAR}[{{model: low@x}}, {{model: z}}]\n---\n"
        f"name: low\n{LINEAR}[{{model: z}}]\n"
    )
    recipe = parse_recipe(text)
    assert recipe.name == "top"
    assert [stage.name for stage in recipe.merges] == ["low", "mid"]
    assert parse_recipe(recipe_yaml(recipe)) == recipe


def test_the_last_document_is_the_result() -> None:
    recipe = parse_recipe(f"name: first\n{LINEAR}[{{model: a}}]\n---\n{LINEAR}[{{model: first}}]\n")
    assert recipe.name is None
    assert [stage.name for stage in recipe.merges] == ["first"]
    assert recipe.merges[0].origin.lines[("models",)] == 4


def test_a_model_may_be_written_at_length() -> None:
    written = "{model: {path: a, revision: x}, lora: {path: c}}"
    recipe = parse_recipe(f"{LINEAR}[{{model: {written}}}, {{model: {{model: b@y}}}}]\n")
    assert recipe == parse_recipe(f"{LINEAR}[{{model: a@x+c}}, {{model: b@y}}]\n")
    assert parse_recipe(recipe_yaml(recipe)) == recipe
