"""Recipes as people write them for mergekit: read as mergekit reads them, each difference with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from mergelab.errors import RecipeError
from mergelab.merging.plan.planner import plan_merge
from mergelab.merging.recipe.recipe_file import parse_recipe, recipe_yaml
from mergelab.merging.recipe.scopes import convert, recipe_warnings
from mergelab.merging.recipe.settings import Unset
from mergelab.merging.run_merge import merge
from mergelab.operators import OPERATORS
from tests.merging.recipes import write_model

READINGS: list[tuple[str, bool | None, float | None, int | None]] = [
    ("yes", True, 1.0, 1),
    ("No", False, 0.0, 0),
    ("on", True, 1.0, 1),
    ("OFF", False, 0.0, 0),
    ("true", True, 1.0, 1),
    ("FALSE", False, 0.0, 0),
    ("y", True, None, None),
    ("'true'", True, None, None),
    ("'false'", False, None, None),
    ("'no'", False, None, None),
    ("'0.7'", None, 0.7, None),
    ("0.7", None, 0.7, None),
    ("1e-4", None, 0.0001, None),
    ("'1e-4'", None, 0.0001, None),
    ("5", None, 5.0, 5),
    ("5.0", None, 5.0, 5),
    ("'5'", None, 5.0, 5),
    ("'5.0'", None, 5.0, 5),
    ("1_000", None, 1000.0, 1000),
    ("'1_000'", None, 1000.0, 1000),
    ("2", None, 2.0, 2),
    ("0", False, 0.0, 0),
    ("1", True, 1.0, 1),
    ("'t'", True, None, None),
    ("'x'", None, None, None),
    ("''", None, None, None),
    ("heavy", None, None, None),
    ("[yes, no]", True, 0.5, None),
    ("['0.2', 0.6]", None, 0.4, None),
    ("[1, '2']", None, 1.5, None),
    ("{value: 'yes'}", True, None, None),
    ("[{filter: mlp, value: '3'}, {value: on}]", None, 3.0, 3),
    ("'.5'", None, 0.5, None),
    ("' 1 '", None, 1.0, 1),
    ("+3", None, 3.0, 3),
    ("0x1F", None, 31.0, 31),
    ("'0x1F'", None, None, None),
    ("null", None, None, None),
    ("1.5", None, 1.5, None),
    ("'1.5'", None, 1.5, None),
]
"""What is written, and what mergekit 0.1.5 takes it for as a boolean, a number and a whole number, in the
middle of the layers of a model; None where it refuses (recorded from `mergekit.config.evaluate_setting`)."""

QUOTED_WORDS = ("'no'", "{value: 'yes'}")
"""Quotes around a word of YAML 1.1: mergekit then refuses it as a number; here it is the same word."""

PARAMETERS = {bool: ("linear", "normalize"), float: ("slerp", "t"), int: ("karcher", "max_iter")}


def reading(written: str, kind: type) -> Any:
    """The value at the middle layer's MLP, and None where the recipe is refused."""
    method, name = PARAMETERS[kind]
    models = "models: [{model: a}, {model: b}]\nbase_model: a\n"
    weight = "weight: 1, " if method == "linear" else ""
    try:
        recipe = parse_recipe(f"merge_method: {method}\n{models}parameters: {{{weight}{name}: {written}}}\n")
        value = recipe.parameters[name].evaluate("model.layers.0.mlp.up_proj.weight", 0.5)
        parameter = OPERATORS[method].parameter(name)
        assert parameter is not None and not isinstance(value, Unset)
        return convert(parameter, value)
    except RecipeError:
        return None


@pytest.mark.parametrize(("written", "switch", "number", "whole"), READINGS)
def test_values_are_what_mergekit_takes_them_for(
    written: str, switch: bool | None, number: float | None, whole: int | None
) -> None:
    for kind, expected in ((bool, switch), (float, number), (int, whole)):
        if not (expected is None and kind is not bool and written in QUOTED_WORDS):
            found = reading(written, kind)
            assert found == expected and type(found) is (type(None) if expected is None else kind)


def notes(text: str) -> list[str]:
    """What a recipe's plan would warn of before it looks at models."""
    recipe = parse_recipe(text, "r.yaml")
    assert parse_recipe(recipe_yaml(recipe)) == recipe
    return [*recipe.origin.notes, *(recipe.origin.sentence(*each) for each in recipe_warnings(recipe))]


LINEAR = "merge_method: linear\nmodels:\n- model: a\n- model: b\nparameters: {weight: 1}\n"
SLERP = "merge_method: slerp\nbase_model: a\nmodels:\n- model: a\n- model: b\nparameters: {t: 0.5}\n"
TIES = "merge_method: ties\nbase_model: c\nmodels:\n- model: a\n- model: b\nparameters: {weight: 1}\n"
SLICES = (
    "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [0, 2]}]\n"
    "- sources: [{model: b, layer_range: [1, 2]}]\n"
)

AS_WRITTEN: dict[str, tuple[str, str, list[str]]] = {
    "parameters of other operators": (
        SLERP.replace("- model: a\n", "- model: a\n  parameters: {weight: 0.3, density: 0.4}\n").replace(
            "- model: b\n", "- model: b\n  parameters: {weight: 0.3}\n"
        ).replace("0.5}\n", "0.5, normalize: true, gamma: [0, 1]}\n"),
        "",
        [
            "parameters.normalize: has no effect: 'slerp' has no such parameter (it has t)",
            "parameters.gamma: has no effect",
            "models[0].parameters.weight: has no effect, nor in 1 other place:",
            "models[0].parameters.density: has no effect: ",
        ],
    ),
    "an unknown key at the top": (
        SLERP + "embed_slerp: true\ndescription: |\n  many words\n",
        SLERP,
        ["r.yaml:7: embed_slerp: has no effect", "r.yaml:8: description: has no effect"],
    ),
    "a key that is nearly one": (
        LINEAR + "base_modle: x\n",
        LINEAR,
        ["r.yaml:6: base_modle: has no effect: recipes have no such key here (did you mean 'base_model'?)"],
    ),
    "keys of the top inside a slice": (
        SLICES.replace("- sources", "- merge_method: slerp\n  sources", 1).replace(
            "[0, 2]}", "[0, 2], base_model: b, weight: 1}"
        ),
        SLICES,
        [
            "r.yaml:3: slices[0].merge_method: has no effect here: it counts at the top of a recipe only",
            "r.yaml:4: slices[0].sources[0].base_model: has no effect here",
            "r.yaml:4: slices[0].sources[0].weight: has no effect",
        ],
    ),
    "unknown keys of a model and a tokenizer": (
        LINEAR.replace("- model: b", "- model: b\n  name: x") + "tokenizer: {source: base, type: fast}\n",
        LINEAR + "tokenizer: {source: base}\n",
        ["models[1].name: has no effect here", "tokenizer.type: has no effect"],
    ),
    "numbers in quotes": (
        LINEAR.replace("weight: 1", "weight: '0.7'"),
        LINEAR.replace("weight: 1", "weight: 0.7"),
        ["r.yaml:5: parameters.weight: the text '0.7' is read as 0.7: write 0.7"],
    ),
    "numbers of YAML 1.1": (
        LINEAR.replace("weight: 1", "weight: [010, -0b11, 0x_1f, 1:30, 1:0:0.5, 0, 00, 08, 1_0, '010']"),
        LINEAR.replace("weight: 1", "weight: [8, -3, 31, 90, 3600.5, 0, 0, 8, 10, 10]"),
        [
            "r.yaml:5: parameters.weight[0]: 010 is read as 8, as YAML 1.1 and mergekit read it: write 8",
            "weight[1]: -0b11 is read as -3",
            "weight[2]: 0x_1f is read as 31",
            "weight[3]: 1:30 is read as 90",
            "weight[4]: 1:0:0.5 is read as 3600.5",
            "parameters.weight: the text '1_0' is read as 10",
            "parameters.weight: the text '010' is read as 10",
        ],
    ),
    "words of YAML 1.1": (
        LINEAR.replace("weight: 1", "weight: 1, normalize: yes"),
        LINEAR.replace("weight: 1", "weight: 1, normalize: true"),
        ["parameters.normalize: the text 'yes' is read as true: write true"],
    ),
    "a boolean for a number": (
        LINEAR.replace("weight: 1", "weight: true"),
        LINEAR,
        ["parameters.weight: true is read as 1: write 1"],
    ),
    "entries with a filter": (
        LINEAR.replace("weight: 1", "weight: [{filter: mlp, value: ['0', '1'], note: x}, {value: 'on'}]"),
        LINEAR.replace("weight: 1", "weight: [{filter: mlp, value: [0, 1]}, {value: 1}]"),
        ["weight.note: has no effect", "'0' is read as 0", "'1' is read as 1", "'on' is read as 1"],
    ),
    "torch's names of dtypes": (
        LINEAR + "dtype: torch.bfloat16\nout_dtype: ''\n",
        LINEAR + "dtype: bfloat16\n",
        ["dtype: 'torch.bfloat16' is read as bfloat16: write bfloat16", "out_dtype: is empty"],
    ),
    "whole numbers and switches of the grammar": (
        SLICES.replace("[0, 2]", "['0', 2.0]")
        + "tokenizer: {tokens: {x: {force: yes}}, pad_to_multiple_of: '8'}\n",
        SLICES + "tokenizer: {tokens: {x: {force: true}}, pad_to_multiple_of: 8}\n",
        ["layer_range: the text '0' is read as 0", "force: the text 'yes' is read", "'8' is read as 8"],
    ),
    "a key twice": (
        LINEAR + "dtype: float32\ndtype: float16\n",
        LINEAR + "dtype: float16\n",
        ["r.yaml:7: dtype: is written twice: line 7 counts, and line 6 does not"],
    ),
    "a key twice inside": (
        LINEAR.replace("weight: 1", "weight: 3, weight: 1"),
        LINEAR,
        ["r.yaml:5: parameters.weight: is written twice"],
    ),
    "another architecture": (
        LINEAR.replace("model: b", "model: {model: {path: b, x: 1}, override_architecture: Y}"),
        LINEAR,
        ["models[1].model.override_architecture: has no effect", "models[1].model.model.x: has no effect"],
    ),
    "no layers": (
        SLICES.replace("slices:", "slices:\n- sources: [{model: a, layer_range: [2, 2]}]"),
        "",
        ["r.yaml:3: slices[0]: takes no layers"],
    ),
    "a density below zero": (
        TIES.replace("weight: 1", "weight: 1, density: [1, -0.1]"),
        "",
        ["r.yaml:6: parameters.density: -0.1 counts as 0: a number >= 0 was expected"],
    ),
    "a document that none uses": (
        "name: x\n" + LINEAR + "---\n" + SLERP,
        SLERP,
        ["r.yaml:1: name: no document uses 'x', so it is not made: run it by itself"],
    ),
    "the base in another spelling": (
        TIES.replace("base_model: c", "base_model: ./a/"),
        "",
        ["models[0]: model 'a' is the base model './a/' in another spelling, and counts as another model"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", AS_WRITTEN)
def test_what_is_ignored_or_read_otherwise_is_named_with_its_place(case: str) -> None:
    text, meant, words = AS_WRITTEN[case]
    found = notes(text)
    assert len(found) == len(words) and all(any(w in note for note in found) for w in words), found
    if meant:
        assert parse_recipe(text) == parse_recipe(meant)
        assert not any("has no effect" in note or "read as" in note for note in notes(meant))


def test_notes_are_in_line_order_few_and_short() -> None:
    many = LINEAR + "".join(f"k{i}: 1\n" for i in range(3000)) + "dtype: float32\n" * 3000
    found = parse_recipe(many, "r.yaml").origin.notes
    assert (
        len(found) == 21 and found[-1] == "r.yaml: 5979 more places are read otherwise than they are written"
    )
    assert found[0].startswith("r.yaml:6: k0:") and all(len(note) < 300 for note in found)


def test_a_value_between_two_layers_is_taken_before_it_is_clipped() -> None:
    """A density that falls from 1 to -1 is 0 from the middle on, not 1/2 there."""
    density = OPERATORS["ties"].parameter("density")
    assert density is not None
    text = TIES.replace("weight: 1", "weight: 1, density: [1, -1]")
    setting = parse_recipe(text).parameters["density"]
    values = [setting.evaluate("", t) for t in (0.0, 0.25, 0.5, 1.0)]
    assert [convert(density, v) for v in values if not isinstance(v, Unset)] == [1.0, 0.5, 0.0, 0.0]


@pytest.mark.parametrize(
    ("method", "name", "beyond", "bound"),
    [
        ("ties", "density", -0.1, 0.0), ("della", "density", -1, 0), ("breadcrumbs", "density", -2, 0),
        ("breadcrumbs", "gamma", 1.5, 1.0), ("sce", "select_topk", 1.5, 1), ("sce", "select_topk", -1, 0),
    ],
)  # fmt: skip
def test_a_value_beyond_its_range_gives_what_the_bound_gives(
    method: str, name: str, beyond: float, bound: float, tmp_path: Path
) -> None:
    for seed, model in enumerate("abc"):
        write_model(tmp_path / model, layers=2, seed=seed)
    outputs = []
    for i, value in enumerate((beyond, bound)):
        weight = "" if method == "sce" else "weight: 0.5, "
        text = TIES.replace("ties", method).replace("weight: 1", f"{weight}{name}: {value}")
        folder = tmp_path / f"out{i}"
        plan = plan_merge(parse_recipe(text), base_dir=tmp_path)
        assert any("counts as" in warning for warning in plan.warnings) == (value == beyond)
        outputs.append(load_file(merge(plan, folder).out / "model.safetensors"))
    assert all(np.array_equal(outputs[0][n], outputs[1][n]) for n in outputs[1])


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_a_probability_below_zero_is_refused_as_by_mergekit(method: str) -> None:
    with pytest.raises(RecipeError, match="-1 is out of range"):
        parse_recipe(TIES.replace("ties", method).replace("weight: 1", "weight: 1, density: -1"))


def test_an_empty_slice_gives_what_stands_before_the_layers(tmp_path: Path) -> None:
    for seed, model in enumerate("ab"):
        write_model(tmp_path / model, layers=2, seed=seed)
    text = "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [1, 1]}]\n"
    text += "- sources: [{model: b, layer_range: [0, 2]}]\n"
    out = merge(plan_merge(parse_recipe(text), base_dir=tmp_path), tmp_path / "out").out
    a, b, made = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b", "out"))
    assert made.keys() == b.keys()
    for name, found in made.items():
        assert np.array_equal(found, (a if "embed" in name else b)[name])
    assert out.is_dir()


def test_the_document_without_a_name_is_the_result_wherever_it_stands() -> None:
    recipe = parse_recipe(LINEAR + "---\nname: x\n" + SLERP + "---\nname: y\n" + TIES)
    assert recipe.name is None and recipe.merge_method == "linear" and recipe.merges == ()
    assert len(recipe.origin.notes) == 2


def test_a_plan_warns_of_all_that_was_noted(tmp_path: Path) -> None:
    for model in "ab":
        write_model(tmp_path / model, layers=2)
    text = LINEAR.replace("weight: 1", "weight: '1', t: 0.5") + "comment: x\n"
    warnings = plan_merge(parse_recipe(text, "r.yaml"), base_dir=tmp_path).warnings
    assert [w.split(": ")[1] for w in warnings[:3]] == ["parameters.weight", "comment", "parameters.t"]
