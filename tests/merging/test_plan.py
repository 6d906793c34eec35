"""Plans: names, shapes, dtypes and configs against mergekit's recorded outputs, and each rule on its own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mergelab.checkpoints.lora_tensor import LowRankTensor
from mergelab.checkpoints.lora_variants import StartFactor, StartFactors
from mergelab.errors import MergelabError, RecipeError
from mergelab.merging.plan.planner import Plan, plan_merge
from mergelab.merging.recipe.recipe_file import load_recipe, parse_recipe
from mergelab.merging.recipe.schema import Recipe
from tests.goldens.recording import read
from tests.merging.recipes import BLOCK, write_model


def plan_of(folder: Path, text: str, **options: Any) -> Plan:
    return plan_merge(parse_recipe(text), base_dir=folder, **options)


def linear(*models: str, **fields: Any) -> Recipe:
    given = {"merge_method": "linear", "models": [{"model": m} for m in models], "parameters": {"weight": 1}}
    return Recipe(**(given | fields))


def test_every_recorded_recipe_plans_what_mergekit_wrote(goldens: Path) -> None:
    for case in sorted((goldens / "recipes").iterdir()):
        plan = plan_merge(load_recipe(case / "config.yaml"), base_dir=goldens)
        if (case / "stats.json").exists():  # random draws: mergekit's weights are kept as statistics
            names = json.loads((case / "stats.json").read_text())
            assert {job.name: job.size for job in plan.jobs} == {k: v["n"] for k, v in names.items()}, (
                case.name
            )
        else:
            planned = {job.name: (job.dtype, job.shape) for job in plan.jobs}
            assert planned == read(goldens, case.name).layout(), case.name
        recorded = json.loads((case / "config.json").read_text())
        for key in (
            "num_hidden_layers",
            "n_layer",
            "vocab_size",
            "hidden_size",
            "tie_word_embeddings",
            "model_type",
        ):
            if key in plan.config:
                assert plan.config[key] == recorded[key], (case.name, key)
        assert plan.config["torch_dtype"] == recorded["dtype"], case.name
        assert all(tuple(source.shape) == job.shape for job in plan.jobs for source in job.sources)
        assert plan.bytes_in > 0 < plan.bytes_out
        for name in ("tokenizer.json", "chat_template.jinja"):
            assert (name in plan.files) or not (case / name).exists()


def test_gradients_run_over_the_layers_of_a_model(tmp_path: Path) -> None:
    write_model(tmp_path / "a", layers=5)
    write_model(tmp_path / "b", layers=5, seed=1)
    text = (
        "merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\n"
        "parameters: {t: [{filter: mlp, value: [0, 1]}, {value: [5, 6, 7]}]}\n"
    )
    plan = plan_of(tmp_path, text)
    found = {job.name: job.merge for job in plan.jobs}
    assert found["model.layers.0.mlp.weight"] != found["model.layers.1.mlp.weight"]
    settings = _settings(plan, tmp_path, text)
    assert settings["model.layers.1.mlp.weight"] == {"t": 0.25}
    assert settings["model.layers.4.mlp.weight"] == {"t": 1.0}
    assert settings["model.layers.1.attn.weight"] == {"t": 5.5}
    assert settings["model.embed_tokens.weight"] == {"t": 5.0}
    assert settings["lm_head.weight"] == {"t": 5.0}


def _settings(plan: Plan, folder: Path, text: str) -> dict[str, Any]:
    """The resolved parameters by tensor, through the same layout the plan uses."""
    from mergelab.checkpoints import open_checkpoint
    from mergelab.merging.plan.output_tensors import lay_out
    from mergelab.merging.recipe.scopes import resolve, scoped_parts
    from mergelab.merging.structure.architecture import infer_architecture
    from mergelab.operators import OPERATORS

    recipe = parse_recipe(text)
    operator = OPERATORS[recipe.merge_method]
    models = {}
    for name in recipe.model_texts():
        checkpoint = open_checkpoint(folder / name)
        models[name] = infer_architecture(checkpoint.tensors, checkpoint.config)
    layout = lay_out(scoped_parts(recipe, operator), models, next(iter(models)))
    assert [place.name for place in layout.places] == [job.name for job in plan.jobs]
    return {
        place.name: resolve(
            operator,
            place.piece,
            list(zip(place.piece.inputs, place.names[: len(place.piece.inputs)], strict=True)),
            place.name,
            place.t,
        )
        for place in layout.places
    }


def test_slices_renumber_layers_and_reslice_per_layer_lists(tmp_path: Path) -> None:
    config = {"model_type": "tiny", "num_hidden_layers": 3, "vocab_size": 6}
    write_model(
        tmp_path / "a", config=config | {"layer_types": ["full", "sliding", "full"], "eos_ids": [1, 2, 3]}
    )
    write_model(tmp_path / "b", seed=1, config=config | {"layer_types": ["lin", "lin", "last"]})
    plan = plan_of(
        tmp_path,
        "merge_method: passthrough\nslices:\n"
        "- sources: [{model: a, layer_range: [0, 2]}]\n"
        "- sources: [{model: a, layer_range: [1, 2]}]\n"
        "- sources: [{model: b, layer_range: [1, 3]}]\n",
    )
    assert plan.config["num_hidden_layers"] == 5
    assert plan.config["layer_types"] == ["full", "sliding", "sliding", "lin", "last"]
    assert plan.config["eos_ids"] == [1, 2, 3]
    jobs = {job.name: job for job in plan.jobs}
    origins = [
        (
            jobs[f"model.layers.{i}.mlp.weight"].model_names[0],
            jobs[f"model.layers.{i}.mlp.weight"].sources[0].name,
        )
        for i in range(5)
    ]
    assert [owner for owner, _ in origins] == ["a", "a", "a", "b", "b"]
    assert [int(name.split(".")[2]) for _, name in origins] == [0, 1, 1, 1, 2]
    assert jobs["model.embed_tokens.weight"].model_names == ("a",)
    assert jobs["lm_head.weight"].model_names == ("b",)
    assert any("come from the first slice (a)" in warning for warning in plan.warnings)
    assert plan.operations == {"copy": 5 * len(BLOCK) + 3}


def test_a_slice_gets_the_base_where_its_layers_are_clear(tmp_path: Path) -> None:
    for name in "abz":
        write_model(tmp_path / name)
    text = (
        "merge_method: task_arithmetic\nbase_model: z\nparameters: {weight: 1}\nslices:\n"
        "- sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [%s]}]\n"
    )
    job = next(job for job in plan_of(tmp_path, text % "0, 2").jobs if "layers.1.mlp" in job.name)
    assert job.base is not None
    assert job.base.name == "model.layers.1.mlp.weight"
    assert job.model_names == ("a", "b", "z")
    with pytest.raises(RecipeError, match="needs the base model among the sources of this slice"):
        parse_recipe(text % "1, 3")


def test_stored_dtypes(tmp_path: Path) -> None:
    half = {"w.0.x": np.ones((2, 2), ml_dtypes.bfloat16), "w.1.x": np.ones((2, 2), ml_dtypes.bfloat16)}
    write_model(tmp_path / "a", half)
    write_model(tmp_path / "b", {name: value.astype(np.float32) for name, value in half.items()})

    def dtypes(*models: str, dtype: str | None = None, **fields: Any) -> set[str]:
        plan = plan_merge(linear(*models, **fields), base_dir=tmp_path, dtype=dtype)
        return {str(job.dtype) for job in plan.jobs}

    assert dtypes("a") == {"bfloat16"}
    assert dtypes("a", "b") == {"float32"}
    assert dtypes("a", "b", dtype="float16") == {"float16"}
    assert dtypes("a", "b", **{"out_dtype": "bfloat16"}) == {"bfloat16"}
    recipe = linear("a", "b").model_copy(update={"dtype": "float64", "out_dtype": "int64"})
    assert {str(job.dtype) for job in plan_merge(recipe, base_dir=tmp_path).jobs} == {"int64"}


def test_what_an_operator_refuses_is_said_once_for_all_its_tensors(tmp_path: Path) -> None:
    write_model(tmp_path / "a")
    with pytest.raises(RecipeError) as caught:
        plan_merge(linear("a", parameters={"weight": [0, 1]}), base_dir=tmp_path)
    (fault,) = caught.value.faults
    assert fault.startswith("tensor 'model.embed_tokens.weight' and 5 more: linear: the weights sum to 0")


def test_tensors_that_hold_no_weights_are_carried_over(tmp_path: Path) -> None:
    ids = {"layers.0.w": np.ones(2, np.float32), "position_ids": np.arange(4)}
    write_model(tmp_path / "a", ids)
    write_model(tmp_path / "b", ids)
    write_model(tmp_path / "c", ids | {"position_ids": np.arange(4, dtype=np.int32)})
    plan = plan_merge(linear("a", "b").model_copy(update={"dtype": "bfloat16"}), base_dir=tmp_path)
    job = next(job for job in plan.jobs if job.name == "position_ids")
    assert (job.merge, job.dtype, len(job.sources)) == (None, np.int64, 2)
    with pytest.raises(RecipeError, match=r"'position_ids' is int32, int64 in different models"):
        plan_merge(linear("a", "c"), base_dir=tmp_path)


def test_shape_mismatch_names_both_sides_and_the_remedy(tmp_path: Path) -> None:
    write_model(tmp_path / "a")
    write_model(tmp_path / "longer", rows=8)
    write_model(tmp_path / "wider", width=5)
    with pytest.raises(RecipeError) as caught:
        plan_merge(linear("a", "longer"), base_dir=tmp_path)
    assert (
        "tensor 'model.embed_tokens.weight' is [6, 4] in model 'a' and [8, 4] in 'longer'; the vocabularies "
        "differ: set 'tokenizer_source: union', or cut them to the shortest with --unsafe-truncate-embeddings"
    ) in caught.value.faults
    assert len(caught.value.faults) == 2
    with pytest.raises(RecipeError, match=r"models that are merged must have the same sizes"):
        plan_merge(linear("a", "wider"), base_dir=tmp_path)
    plan = plan_merge(linear("longer", "a"), base_dir=tmp_path, truncate_embeddings=True)
    (job,) = (job for job in plan.jobs if "embed" in job.name)
    assert job.shape == (6, 4)
    assert plan.config["vocab_size"] == 6
    read = np.empty(24, np.float32)
    job.sources[0].read_into(0, read)
    from safetensors.numpy import load_file

    whole = load_file(tmp_path / "longer" / "model.safetensors")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(read, whole[:6].ravel())


def test_a_missing_head_is_the_embedding_it_is_tied_to(tmp_path: Path) -> None:
    write_model(
        tmp_path / "a", config={"num_hidden_layers": 3, "tie_word_embeddings": True}, drop=["lm_head.weight"]
    )
    write_model(tmp_path / "b", config={"num_hidden_layers": 3, "tie_word_embeddings": False})
    both = plan_merge(linear("a", "b"), base_dir=tmp_path)
    head = next(job for job in both.jobs if job.name == "lm_head.weight")
    assert [source.name for source in head.sources] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert both.config["tie_word_embeddings"] is False
    assert any("tie_word_embeddings is set to false" in warning for warning in both.warnings)
    alone = plan_merge(linear("a"), base_dir=tmp_path)
    assert "lm_head.weight" not in {job.name for job in alone.jobs}
    assert alone.config["tie_word_embeddings"] is True


NORM = "model.layers.1.norm.weight"
LACKING = {
    # method: (parameters, outcome if only the base lacks it, outcome if only the model lacks it)
    "slerp": ("t: 0.5", "copy a", "copy base"),
    "arcee_fusion": ("", "copy a", "copy base"),
    "nearswap": ("t: 0.5", "fault", "copy base"),
    "task_arithmetic": ("weight: 1", "fault", "copy base"),
    "linear": ("weight: 1", "merge a", "merge base"),
}


@pytest.mark.parametrize("method", LACKING)
def test_what_becomes_of_a_lone_tensor(tmp_path: Path, method: str) -> None:
    parameters, without_base, without_model = LACKING[method]
    text = f"merge_method: {method}\nbase_model: base\nmodels: [{{model: a}}]\nparameters: {{{parameters}}}\n"
    for expected, (base_drops, model_drops) in ((without_base, ([NORM], [])), (without_model, ([], [NORM]))):
        write_model(tmp_path / "base", drop=base_drops)
        write_model(tmp_path / "a", drop=model_drops, seed=1)
        if expected == "fault":
            with pytest.raises(RecipeError, match=rf"tensor '{NORM}' is missing from the base model 'base'"):
                plan_of(tmp_path, text, allow_mixed_architectures=True)
            continue
        with pytest.raises(RecipeError, match=f"'{NORM}' is missing from '.*', though other models have it"):
            plan_of(tmp_path, text)
        plan = plan_of(tmp_path, text, allow_mixed_architectures=True)
        job = next(job for job in plan.jobs if job.name == NORM)
        kind, owner = expected.split()
        assert (kind, owner) == ("copy" if job.merge is None else "merge", job.model_names[0])
        lacking = "base" if owner == "a" else "a"
        assert any(f"'{NORM}' is missing from '{lacking}'" in warning for warning in plan.warnings)


def test_model_stock_falls_back_to_the_base_or_leaves_the_tensor_out(tmp_path: Path) -> None:
    text = "merge_method: model_stock\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"
    write_model(tmp_path / "base")
    write_model(tmp_path / "a", seed=1, drop=[NORM])
    write_model(tmp_path / "b", seed=2)
    plan = plan_of(tmp_path, text, allow_mixed_architectures=True)
    job = next(job for job in plan.jobs if job.name == NORM)
    assert (job.merge, job.model_names) == (None, ("base",))
    write_model(tmp_path / "base", drop=[NORM])
    plan = plan_of(tmp_path, text, allow_mixed_architectures=True)
    assert NORM not in {job.name for job in plan.jobs}
    assert any(NORM in warning and "left out" in warning for warning in plan.warnings)


def test_parameters_of_a_model_without_the_tensor_are_dropped(tmp_path: Path) -> None:
    write_model(tmp_path / "a", drop=[NORM])
    write_model(tmp_path / "b")
    recipe = Recipe(
        merge_method="linear",
        models=[{"model": "a", "parameters": {"weight": 3}}, {"model": "b", "parameters": {"weight": 0.5}}],
        parameters={"normalize": False},
    )
    plan = plan_merge(recipe, base_dir=tmp_path, allow_mixed_architectures=True)
    jobs = {job.name: job for job in plan.jobs}
    one = np.ones(4, np.float32)
    merge = jobs[NORM].merge
    assert merge is not None
    np.testing.assert_allclose(np.asarray(merge([one])), 0.5 * one)


def test_wrapped_and_bare_names_meet(tmp_path: Path) -> None:
    shapes = {"wte.weight": (6, 4), "h.0.w": (2,), "h.1.w": (2,), "ln_f.weight": (2,)}
    bare = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    write_model(tmp_path / "bare", bare, config={"n_layer": 2})
    write_model(tmp_path / "full", {f"transformer.{n}": t for n, t in bare.items()}, config={"n_layer": 2})
    for first, second, prefix in (("full", "bare", "transformer."), ("bare", "full", "")):
        plan = plan_merge(linear(first, second), base_dir=tmp_path)
        assert {job.name for job in plan.jobs} == {prefix + name for name in bare}
        assert all(len(job.sources) == 2 for job in plan.jobs)
        assert plan.warnings == ()


def test_models_that_do_not_fit_are_refused_or_warned_about(tmp_path: Path) -> None:
    write_model(tmp_path / "a", config={"num_hidden_layers": 3, "rope_theta": 1e4, "num_attention_heads": 2})
    write_model(tmp_path / "b", config={"num_hidden_layers": 3, "rope_theta": 1e6, "num_attention_heads": 4})
    write_model(tmp_path / "deep", layers=4)
    write_model(tmp_path / "other", {"encoder.layer.0.q": np.ones(2, np.float32)}, config={})
    warnings = plan_merge(linear("a", "b"), base_dir=tmp_path).warnings
    assert [warning.split(" is ")[0] for warning in warnings] == ["num_attention_heads", "rope_theta"]
    with pytest.raises(RecipeError, match=r"different numbers of layers \(a: 3, deep: 4\)"):
        plan_merge(linear("a", "deep"), base_dir=tmp_path)
    with pytest.raises(RecipeError, match="'other' has no tensor name in common with 'a'"):
        plan_merge(linear("a", "other"), base_dir=tmp_path)
    text = "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [1, 9]}]}]\n"
    with pytest.raises(
        RecipeError, match=r"recipe:2: slices\[0\].* \[1, 9\] is beyond model 'a': it has 3 layers"
    ):
        plan_of(tmp_path, text)


def test_missing_models_are_all_named_with_where_they_were_looked_for(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    folder = tmp_path / "recipes"
    write_model(folder / "llama-one")
    (folder / "r.yaml").write_text(
        "merge_method: linear\nparameters: {weight: 1}\nmodels:\n- model: ./llama-one\n- model: lama-one\n"
        "- model: someone/some-model\n"
    )
    with pytest.raises(RecipeError) as caught:
        plan_merge(load_recipe(folder / "r.yaml"))
    near, hub = caught.value.faults
    assert near.startswith(
        "r.yaml:5: models[1].model: model 'lama-one' does not exist (did you mean 'llama-one'?)"
    )
    assert str(tmp_path / "cwd") in near
    assert str(folder) in near
    assert hub.startswith("r.yaml:6: models[2].model: model 'someone/some-model' is not a folder (looked in ")
    assert "hub" in hub
    write_model(tmp_path / "cwd" / "lama-one")
    write_model(tmp_path / "cwd" / "someone" / "some-model")
    assert len(plan_merge(load_recipe(folder / "r.yaml")).models) == 3


def test_the_working_directory_comes_before_the_recipes_folder(tmp_path: Path, monkeypatch) -> None:
    for place in ("cwd", "recipes"):
        write_model(tmp_path / place / "m", seed=len(place))
    (tmp_path / "recipes" / "r.yaml").write_text("merge_method: passthrough\nmodels: [{model: m}]\n")
    monkeypatch.chdir(tmp_path / "cwd")
    (model,) = plan_merge(load_recipe(tmp_path / "recipes" / "r.yaml")).models
    assert model.checkpoint.path.resolve() == (tmp_path / "cwd" / "m").resolve()


def test_identity_changes_with_what_determines_the_bytes(tmp_path: Path) -> None:
    write_model(tmp_path / "a")
    write_model(tmp_path / "b", seed=1)

    def identities(weight: float = 1, **options: Any) -> dict[str, str]:
        return dict(
            plan_merge(
                linear("a", "b", parameters={"weight": weight}), base_dir=tmp_path, **options
            ).identities
        )

    same, again = identities(), identities()
    assert same == again
    changed = {
        name: {key for key in same if same[key] != other[key]}
        for name, other in {
            "weight": identities(2),
            "seed": identities(seed=1),
            "dtype": identities(dtype="float16"),
            "shards": identities(shard_bytes=100),
        }.items()
    }
    assert changed == {
        "weight": {"recipe", "jobs"},
        "seed": {"seed"},
        "dtype": {"jobs", "config"},
        "shards": {"shard_bytes"},
    }
    write_model(tmp_path / "b", seed=1, config={"num_hidden_layers": 3, "other": 1})
    assert {key for key, value in identities().items() if value != same[key]} == {"models"}
    write_model(tmp_path / "b", seed=2)
    assert {key for key, value in identities().items() if value != same[key]} == {"models"}
    write_model(tmp_path / "b", seed=1)
    assert identities() == same


def test_adapters_are_added_to_the_model(goldens: Path) -> None:
    recipe = linear("models/llama-base+models/llama-lora", "models/llama-base")
    plan = plan_merge(recipe, base_dir=goldens)
    job = next(job for job in plan.jobs if job.name == "model.layers.0.self_attn.q_proj.weight")
    with_adapter, plain = (np.empty(16, np.float32) for _ in range(2))
    job.sources[0].read_into(0, with_adapter)
    job.sources[1].read_into(0, plain)
    assert not np.array_equal(with_adapter, plain)
    assert plan.models[0].fingerprint != plan.models[1].fingerprint


def test_a_graph_of_merges_is_planned_whole_before_anything_runs(tmp_path: Path) -> None:
    write_model(tmp_path / "a")
    write_model(tmp_path / "b", seed=1)
    text = (
        "name: twice\nmerge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [0, 3]}]\n"
        "- sources: [{model: b, layer_range: [1, 3]}]\n---\n"
        "merge_method: linear\nmodels: [{model: twice}]\nparameters: {weight: [1, 2]}\ndtype: bfloat16\n"
    )
    plan = plan_of(tmp_path, text)
    assert plan.config["num_hidden_layers"] == 5
    assert list(plan.stages) == ["twice"]
    assert [job.name for job in plan.jobs] == [job.name for job in plan.stages["twice"].jobs]
    with pytest.raises(MergelabError, match="belongs to a merge that has not run yet"):
        plan.jobs[0].sources[0].read_into(0, np.empty(1, np.float32))


def test_memory_and_counts(tmp_path: Path) -> None:
    write_model(tmp_path / "a")
    plan = plan_merge(linear("a"), base_dir=tmp_path)
    assert plan.operations == {"linear": 12}
    assert plan.bytes_in == plan.bytes_out == sum(job.size for job in plan.jobs) * 4
    assert plan.memory_estimate(10**2) < plan.memory_estimate(10**9)


def test_the_memory_of_a_plan_counts_what_adapters_decompose(tmp_path: Path) -> None:
    write_model(tmp_path / "a")
    plan = plan_merge(linear("a"), base_dir=tmp_path)
    job = next(job for job in plan.jobs if len(job.shape) == 2)
    weight = job.sources[0]
    first = StartFactors(weight, False, 2, "pissa")
    sides = (StartFactor(first, "left"), False), (StartFactor(first, "right"), False)
    decomposed = replace(job, sources=(LowRankTensor(weight, *sides, -1.0), weight))
    assert decomposed.bytes_decomposed == first.workspace > 17 * job.bytes_in
    other = replace(plan, jobs=(*plan.jobs, decomposed))
    assert other.memory_estimate(10) == plan.memory_estimate(10) + first.workspace
