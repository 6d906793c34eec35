"""Whatever a recipe holds, it is read, or refused in a short sentence, in seconds."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergelab.errors import CheckpointError, MergelabError, RecipeError, quoted, shortened
from mergelab.merging.plan.output_tensors import MAX_LAYERS
from mergelab.merging.plan.planner import plan_merge
from mergelab.merging.recipe.recipe_file import load_recipe, parse_recipe, recipe_yaml
from mergelab.merging.recipe.schema import Recipe
from tests.merging.recipes import write_model

LINEAR = "merge_method: linear\nparameters: {weight: 1}\n"
HUGE = "0x" + "f" * 6000
FIELDS = sorted(Recipe.model_fields)


def refused(text: str, message: str) -> RecipeError:
    """The error of a recipe that is refused within ten seconds, 2,000 characters and 20 faults."""
    began = time.process_time()
    with pytest.raises(RecipeError, match=message) as caught:
        parse_recipe(text)
    assert time.process_time() - began < 10
    assert len(str(caught.value)) <= 2000
    assert len(caught.value.faults) <= 21
    return caught.value


@pytest.mark.parametrize("field", FIELDS)
def test_a_number_of_six_thousand_digits_is_refused_in_any_field(field: str) -> None:
    for digits in (HUGE, "9" * 6000, "1e999", "-" + "9" * 400):
        refused(f"{field}: {digits}\n", rf"recipe:1: {field}: the number .* is too large or too long")


@pytest.mark.parametrize("name", ["weight", "density", "lambda", "normalize"])
@pytest.mark.parametrize(
    "value", ["9" * 400, "0x" + "f" * 400, "1e999", ".inf", ".nan", "2001-01-01", "[[1]]", "{}"]
)
def test_a_parameter_that_is_no_number_is_refused(name: str, value: str) -> None:
    weight = "" if name == "weight" else "weight: 1, "
    models = "merge_method: ties\nbase_model: b\nmodels: [{model: a}]\n"
    text = f"{models}parameters: {{{weight}{name}: {value}}}\n"
    refused(text, "recipe:4: parameters")


def test_numbers_beyond_float64_from_python_are_refused_too() -> None:
    for value in (10**400, 10**5000):
        recipe = Recipe(merge_method="linear", models=[{"model": "a"}], parameters={"weight": value})
        with pytest.raises(RecipeError, match=r"found a number of about [0-9]+ digits"):
            plan_merge(recipe)


@pytest.mark.parametrize(
    "value", ["[]", "[1]", "[1, 2, 3]", "null", "{}", "[a, b]", "[0, 1.5]", "[0, 99999999999]"]
)
def test_a_layer_range_is_two_whole_numbers(value: str) -> None:
    text = f"merge_method: passthrough\nslices: [{{sources: [{{model: a, layer_range: {value}}}]}}]\n"
    error = refused(text, r"slices\[0\]\.sources\[0\]\.layer_range")
    assert all("layer_range" in fault for fault in error.faults)


def test_layers_are_counted_before_they_are_laid_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "a")
    billion = "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 1000000000]}]}]\n"
    with pytest.raises(RecipeError, match="is beyond model 'a': it has 3 layers"):
        plan_merge(parse_recipe(billion))
    one = "{sources: [{model: a, layer_range: [0, 3]}]}"
    slices = f"x: &s {one}\n".replace("x: ", "slices: [") + ", *s" * (MAX_LAYERS // 3) + "]\n"
    with pytest.raises(RecipeError, match=r"the output has 10,002 layers; at most 10,000 are made"):
        plan_merge(parse_recipe("merge_method: passthrough\n" + slices))


@pytest.mark.parametrize(
    "name", ["x" * 300, "/".join(["d"] * 300), "/".join(["d" * 200] * 30), "~nobody/x", "a+" + "x" * 300]
)
def test_a_name_too_long_for_a_file_is_a_model_that_does_not_exist(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "a")
    with pytest.raises(RecipeError, match=r"model '.*' does not exist: looked in") as caught:
        plan_merge(parse_recipe(f"{LINEAR}models: [{{model: '{name}'}}]\n"))
    assert len(str(caught.value)) < 500


def chain(count: int) -> str:
    """Recipes of which each builds on the next."""
    bases = [f"r{i + 1}" for i in range(count - 1)] + ["x"]
    return "---\n".join(
        f"name: r{i}\n{LINEAR}base_model: {base}\nmodels: [{{model: m}}]\n" for i, base in enumerate(bases)
    )


def test_a_long_chain_of_recipes_is_followed() -> None:
    recipe = parse_recipe(chain(1500))
    assert [stage.name for stage in recipe.merges] == [f"r{i}" for i in range(1499, 0, -1)]


def test_a_long_circle_of_recipes_is_refused() -> None:
    names = "---\n".join(f"name: r{i}\n{LINEAR}models: [{{model: r{(i + 1) % 1500}}}]\n" for i in range(1500))
    assert "r1499 -> r0 -> r1" in str(refused(names, "the merges lead in a circle: "))


def test_a_long_recipe_is_read_in_seconds() -> None:
    began = time.process_time()
    text = LINEAR + "models:\n" + "".join(f"- model: m{i}\n" for i in range(6000))
    assert len(parse_recipe(text).models or ()) == 6000
    assert time.process_time() - began < 10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LINEAR + "models: [" + "a, " * 100_000 + "]", "more than 100,000 values"),
        (LINEAR + "models: [" + "a, " * 10_000 + "]", r"and 9,9\d\d more"),
        (LINEAR + "models:\n" + "- model: m\n" * 3000, r"listed twice(?s:.*)and 2,9\d\d more"),
        ("merge_method: " + "x" * 1_000_000, "found none"),
        (LINEAR + "models: [{model: '" + "+" * 1_000_000 + "'}]", "has 1000000 '\\+'"),
        (LINEAR + "models: [{model: {model: {path: a, revision: [1]}}}]", "a part of a model reference"),
        (LINEAR + 'models: [{model: "a\\0b"}]', "holds a character that no text has"),
        (LINEAR + "models: [{model: a}]\ntokenizer: {pad_to_multiple_of: 99999999999}", "pad_to_multiple_of"),
        ("a: &a [*a]", "an alias inside its own anchor"),
        ("[" * 3000, "nested too deeply|not valid YAML"),
    ],
)
def test_a_hostile_recipe_gets_a_short_message(text: str, message: str) -> None:
    refused(text, message)


def test_what_is_no_file_of_text_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(3 * 10**9)
    for path in (
        tmp_path,
        tmp_path / "pipe",
        tmp_path / "huge",
        Path("/dev/zero"),
        Path("x" * 300),
        Path("a\0b"),
    ):
        with pytest.raises(RecipeError, match="recipe"):
            load_recipe(path)


def test_messages_quote_shortly_whatever_the_value() -> None:
    deep: list[object] = []
    for _ in range(5000):
        deep = [deep]

    class Broken:
        def __repr__(self) -> str:
            raise RuntimeError

    for value in (
        10**9000,
        -(10**9000),
        "x" * 10**6,
        b"x" * 10**6,
        deep,
        {"a": deep},
        list(range(10**5)),
        Broken(),
    ):
        assert len(quoted(value)) <= 80
    assert [quoted(v) for v in ("a", 1, 1.5, None, [1, "b"], (1,), {"a": 1})] == [
        *("'a'", "1", "1.5", "None", "[1, 'b']", "(1,)", "{'a': 1}")
    ]
    assert shortened("abc", 3) == "abc"
    assert len(shortened("x" * 99, 20)) == 20
    error = CheckpointError([f"fault {i}" for i in range(1000)])
    assert error.faults[-1] == "and 980 more"
    assert str(CheckpointError("a \ud800 b")) == "a \\ud800 b"


VALID = (
    "merge_method: ties\nbase_model: base\nmodels:\n"
    "- {model: a, parameters: {weight: [0, 1], density: 0.5}}\n"
    "- {model: b+c, parameters: {weight: {filter: mlp, value: 1}}}\nparameters: {normalize: true}\n"
    "tokenizer: {source: union, tokens: {x: {source: a, force: true}}}\ndtype: bfloat16\n"
)
SNIPPETS = st.sampled_from(
    ["[", "{", "&a ", "*a", ": ", "- ", "\n", "0x", "9" * 400, "1e999", ".nan", "null", "\t", "+"]
)


@given(
    st.lists(
        st.tuples(st.integers(0, len(VALID)), st.integers(0, 8), st.one_of(SNIPPETS, st.text(max_size=3)))
    )
)
def test_a_mutated_recipe_is_read_or_refused(edits: list[tuple[int, int, str]]) -> None:
    text = VALID
    for start, cut, new in edits[:4]:
        text = text[:start] + new + text[start + cut :]
    try:
        recipe = parse_recipe(text)
        assert parse_recipe(recipe_yaml(recipe)) == recipe
    except MergelabError as error:
        assert len(str(error)) <= 2000
