"""Every way a recipe can be wrong: the one sentence it gets, with file, line, field and remedy."""

from __future__ import annotations

import pytest

from mergelab.errors import RecipeError
from mergelab.merging.recipe.recipe_file import load_recipe, parse_recipe, recipe_yaml
from mergelab.merging.recipe.schema import Recipe
from mergelab.merging.recipe.scopes import recipe_warnings

TIES = "merge_method: ties\nbase_model: base\nmodels:\n- model: a\n  parameters: {weight: 1}\n"
LINEAR = "merge_method: linear\nmodels:\n- model: a\n- model: b\nparameters: {weight: 1}\n"
SLERP = "merge_method: slerp\nbase_model: base\nparameters: {t: 0.5}\n"
TWO_SOURCES = "  - {model: a, layer_range: [0, 2]}\n  - {model: b, layer_range: [0, 3]}\n"
TWICE = "  - {model: a, layer_range: [0, 2]}\n  - {model: a, layer_range: [1, 3]}\n"

BAD = {
    "empty": ("", "r.yaml: is empty"),
    "not a mapping": ("- a\n- b\n", "r.yaml:1: expected a mapping with 'merge_method'"),
    "broken yaml": ("merge_method: [a\n", "r.yaml:2: not valid YAML"),
    "tab": ("a:\n\tb: 1\n", "r.yaml:2: not valid YAML"),
    "tag": ("merge_method: !!python/name:os.system x\n", "is not allowed here"),
    "bare tag": ("merge_method: ! ties\n", "tag '!' is not allowed here"),
    "list key": ("? [a, b]\n: 1\n", "r.yaml:1: a key must be a plain word"),
    "merge key of a scalar": ("<<: 3\n", "a merge key takes an alias of a mapping"),
    "anchor inside itself": ("merge_method: &a [*a]\n", "nested too deeply"),
    "misspelled key": (
        TIES.replace("base_model", "base_modle"),
        "r.yaml:2: base_modle: unknown key (did you mean 'base_model'?)",
    ),
    "no method": ("models: [{model: a}]\n", "merge_method: is missing"),
    "unknown method": (
        LINEAR.replace("linear", "liner"),
        "unknown merge method 'liner' (did you mean 'linear'?)",
    ),
    "method in capitals": (TIES.replace("ties", "TIES"), "method 'TIES' (did you mean 'ties'?)"),
    "method with a hyphen": (TIES.replace("ties", "DARE-TIES"), "(did you mean 'dare_ties'?)"),
    "strange method": (LINEAR.replace("linear", "xyzzy"), "(known: arcee_fusion, breadcrumbs, "),
    "no models": (
        "merge_method: linear\n",
        "exactly one of 'models', 'slices' and 'modules' must be given, found none",
    ),
    "two forms": (
        LINEAR + "slices: [{sources: [{model: a, layer_range: [0, 1]}]}]\n",
        "found models and slices",
    ),
    "models is text": ("merge_method: linear\nmodels: a\n", "r.yaml:2: models: expected a list, found 'a'"),
    "model is text": (
        "merge_method: karcher\nmodels:\n- a\n",
        "r.yaml:3: models[0]: expected a mapping, found 'a'",
    ),
    "model key": (TIES + "- modle: b\n", "r.yaml:6: models[1].modle: unknown key (did you mean 'model'?)"),
    "model missing": (TIES + "- parameters: {weight: 1}\n", "r.yaml:6: models[1].model: is missing"),
    "model is number": (
        TIES + "- {model: 7, parameters: {weight: 1}}\n",
        "models[1].model: expected a word, found 7",
    ),
    "model without a path": (TIES.replace("model: a", "model: {lora: a}"), "reference names no model"),
    "model of strange parts": (TIES.replace("model: a", "model: {model: [a]}"), "is a text, or a mapping"),
    "two adapters": (TIES.replace("model: a", "model: a+b+c"), "has 2 '+': one LoRA adapter is allowed"),
    "empty revision": (TIES.replace("model: a", "model: a@"), "has an empty part"),
    "unknown parameter": (
        TIES.replace("weight: 1", "weight: 1, desnity: 1"),
        "r.yaml:5: models[0].parameters.desnity: unknown parameter of 'ties' (did you mean 'density'?)",
    ),
    "parameter of no method": (
        LINEAR.replace("weight: 1}", "weight: 1, xyzzy: 0.5}"),
        "parameters.xyzzy: unknown parameter of 'linear' (it has weight, normalize)",
    ),
    "word for number": (
        TIES.replace("1}", "heavy}"),
        "models[0].parameters.weight: expected a number, found 'heavy'",
    ),
    "number for boolean": (TIES + "parameters: {normalize: 2}\n", "expected true or false, found 2"),
    "below range": (
        TIES.replace("ties", "dare_ties").replace("1}", "1, density: -1}"),
        "-1 is out of range: expected a number >= 0",
    ),
    "range in a gradient": (
        TIES.replace("ties", "della").replace("1}", "1, epsilon: [0.1, -2]}"),
        "-2 is out of range",
    ),
    "range in a filter": (
        TIES.replace("ties", "dare_ties").replace("1}", "1, density: [{filter: mlp, value: -3}]}"),
        "-3 is out of range",
    ),
    "above range": (
        "merge_method: multislerp\nmodels: [{model: a}]\nparameters:\n  {weight: 1, eps: 7}\n",
        "r.yaml:4: parameters.eps: 7 is out of range: expected a number from 0 to 1",
    ),
    "infinite": (TIES.replace("1}", ".inf}"), "expected a number, found inf"),
    "not a number": (TIES.replace("1}", ".nan}"), "expected a number, found nan"),
    "fraction for whole": (
        "merge_method: karcher\nmodels: [{model: a}]\nparameters: {max_iter: 1.5}\n",
        "expected a whole number >= 0, found 1.5",
    ),
    "null": (TIES.replace("1}", "null}"), "weight: has no value: a number is needed"),
    "filter without value": (
        TIES.replace("1}", "[{filter: a}]}"),
        "entry 1: 'value' is missing beside 'filter'",
    ),
    "required for one model": (
        TIES + "- model: b\n",
        "models[1].parameters.weight: 'ties' needs this parameter for model 'b'",
    ),
    "required for all": (
        SLERP.replace("parameters: {t: 0.5}\n", "models: [{model: a}]\n"),
        "parameters.t: 'slerp' needs this",
    ),
    "no base": (
        TIES.replace("base_model: base\n", ""),
        "models: 'ties' needs a base model: add 'base_model:'",
    ),
    "too many models": (
        SLERP + "models: [{model: a}, {model: b}]\n",
        "'slerp' takes 1 model(s) besides the base model, found 2 (a, b)",
    ),
    "too few models": (
        SLERP + "models: [{model: base}]\n",
        "'slerp' takes 1 model(s) besides the base model, found 0",
    ),
    "too few for stock": (
        "merge_method: model_stock\nbase_model: b\nmodels: [{model: a}]\n",
        "'model_stock' takes at least 2 model(s) besides the base model, found 1 (a)",
    ),
    "passthrough of two": (
        "merge_method: passthrough\nmodels: [{model: a}, {model: b}]\n",
        "'passthrough' takes",
    ),
    "listed twice": (LINEAR.replace("model: b", "model: a"), "models[1]: model 'a' is listed twice"),
    "unequal slices": (
        "merge_method: linear\nslices:\n- sources:\n" + TWO_SOURCES,
        "equally many layers, found a: 2, b: 3",
    ),
    "repeat in a slice": (
        "merge_method: linear\nslices:\n- sources:\n" + TWICE,
        "model 'a' is listed twice in one slice",
    ),
    "backward range": (
        "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [3, 2]}]\n",
        "slices[0].sources[0].layer_range: layer range [3, 2] is negative",
    ),
    "only empty ranges": (
        "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [3, 3]}]\n",
        "slices[0]: no slice takes a layer",
    ),
    "range of words": (
        "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [x, 3]}]\n",
        "slices[0].sources[0].layer_range[0]: expected a whole number, found 'x'",
    ),
    "no range": (
        "merge_method: passthrough\nslices:\n- sources: [{model: a}]\n",
        "sources[0].layer_range: is missing",
    ),
    "no sources": (
        "merge_method: passthrough\nslices:\n- sources: []\n",
        "slices[0].sources: expected at least 1",
    ),
    "module without form": (
        "merge_method: linear\nmodules: {text: {parameters: {}}}\n",
        "a module needs exactly one of",
    ),
    "dtype": (LINEAR + "dtype: bf16\n", "r.yaml:6: dtype: expected one of 'bfloat16'"),
    "dtype near": (LINEAR + "out_dtype: bloat16\n", "(did you mean 'bfloat16'?)"),
    "both tokenizers": (
        LINEAR + "tokenizer_source: union\ntokenizer: {source: base}\n",
        "'tokenizer_source' and 'tokenizer' say the same thing: keep one",
    ),
    "padding": (LINEAR + "tokenizer: {pad_to_multiple_of: 0}\n", "tokenizer.pad_to_multiple_of: "),
    "force": (
        LINEAR + "tokenizer: {tokens: {x: {force: maybe}}}\n",
        "tokenizer.tokens.x.force: expected true or false, found 'maybe'",
    ),
    "token kind": (
        LINEAR + "tokenizer: {tokens: {x: {source: {kind: zeros}}}}\n",
        "tokens.x.source.kind: expected one of 'zero', 'model_token', found 'zeros' (did you mean 'zero'?)",
    ),
    "token without model": (
        LINEAR + "tokenizer: {tokens: {x: {source: {kind: model_token, token: y}}}}\n",
        "kind 'model_token' needs 'model' and exactly one of 'token' and 'token_id'",
    ),
    "unnamed first document": (LINEAR + "---\n" + LINEAR, "r.yaml:1: this document needs a 'name'"),
    "same name": ("name: x\n" + LINEAR + "---\nname: x\n" + LINEAR, "another document is named 'x'"),
    "circle": (
        "name: x\n"
        + LINEAR.replace("model: a", "model: y")
        + "---\nname: y\n"
        + LINEAR.replace("model: a", "model: x"),
        "the merges lead in a circle: y -> x -> y",
    ),
    "own result": (
        "name: x\n"
        + LINEAR
        + "---\nname: y\n"
        + LINEAR.replace("model: a", "model: y").replace("model: b", "model: x"),
        "the merges lead in a circle: y -> y",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_the_sentence(name: str) -> None:
    text, words = BAD[name]
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml")
    assert words in str(caught.value)
    assert all(fault.startswith("r.yaml:") and "\n" not in fault for fault in caught.value.faults)


@pytest.mark.parametrize("text", [TIES, LINEAR, SLERP + "models: [{model: a}]\n"])
def test_what_the_bad_ones_were_made_from_is_fine(text: str) -> None:
    assert parse_recipe(recipe_yaml(parse_recipe(text))) == parse_recipe(text)


def test_all_faults_come_at_once_in_line_order() -> None:
    text = """merge_method: ties
base_modle: x
models:
- model: a
  parameters: {weight: heavy, desnity: 0.5}
- modle: b
  parameters: {density: -3, weight: {}}
- foo
dtype: bf16
parameters:
  normalize: maybe
  tt: 1
"""
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml")
    fields = [fault.split(": ")[1] for fault in caught.value.faults]
    assert fields == [
        "base_modle",
        "models",
        "models[0].parameters.weight",
        "models[0].parameters.desnity",
        "models[1].model",
        "models[1].modle",
        "models[1].parameters.weight",
        "models[2]",
        "dtype",
        "parameters.normalize",
        "parameters.tt",
    ]
    lines = [int(fault.split(":")[1]) for fault in caught.value.faults]
    assert lines == sorted(lines)


def test_a_recipe_built_in_python_names_fields_too() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe(merge_method="ties", models=[{"modle": "a"}], dtype="bf16")
    assert "models[0].modle: unknown key (did you mean 'model'?)" in caught.value.faults
    assert any(fault.startswith("dtype: expected one of") for fault in caught.value.faults)


def test_what_is_never_read_is_a_warning_with_the_right_place() -> None:
    recipe = parse_recipe(
        "merge_method: ties\nbase_model: base\nmodels:\n- {model: base, parameters: {weight: 1}}\n"
        "- {model: a, parameters: {weight: 1, lambda: 2, int8_mask: true}}\n"
    )
    assert recipe_warnings(recipe) == [
        (
            ("models", 1, "parameters", "lambda"),
            "is shared by all models and never read here: move it to the top-level 'parameters'",
        ),
        (
            ("models", 1, "parameters", "int8_mask"),
            "is shared by all models and never read here: move it to the top-level 'parameters'",
        ),
        (("models", 0, "parameters", "weight"), "is never read for the base model of 'ties': remove it"),
    ]
    assert recipe_warnings(parse_recipe(TIES)) == []


def test_a_missing_file_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"recipe 'no\.yaml' does not exist \(looked in "):
        load_recipe("no.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"merge_method: \xff\xfe")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe("latin.yaml")


def test_a_recipe_at_a_url_is_said_to_be_one() -> None:
    with pytest.raises(RecipeError, match=r"r\.yaml' is a URL; download it and name the file"):
        load_recipe("https://hub.example/r.yaml")
