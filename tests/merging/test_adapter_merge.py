"""Adapters merged to an adapter: weights apply to products, whose factors are cut with the error stated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from mergelab import operators as ops
from mergelab.checkpoints import open_checkpoint, read_whole, with_lora
from mergelab.cli.main import cli
from mergelab.errors import CheckpointError, RecipeError
from mergelab.merging import Recipe, check_recipe, merge_adapters
from tests.merging.recipes import write_model

RNG = np.random.default_rng(0)
SHAPES = {
    "model.layers.0.q_proj": (8, 12),
    "model.layers.1.q_proj": (8, 12),
    "model.layers.1.up_proj": (14, 12),
}
Adapter = tuple[dict[str, Any], dict[str, np.ndarray]]


def adapter(rank: int = 2, *, modules: Mapping[str, int] | None = None, **fields: Any) -> Adapter:
    """The config and tensors of an adapter with factors of the given rank on each module."""
    ranks = dict.fromkeys(SHAPES, rank) if modules is None else modules
    tensors = {}
    for module, r in ranks.items():
        rows, columns = SHAPES[module]
        stem = f"base_model.model.{module}"
        tensors[f"{stem}.lora_A.weight"] = RNG.standard_normal((r, columns)).astype(np.float32)
        tensors[f"{stem}.lora_B.weight"] = RNG.standard_normal((rows, r)).astype(np.float32)
    targets = ["q_proj", "up_proj"]
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 4,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
    }
    return {**config, "base_model_name_or_path": "org/base", **fields}, tensors


def write(folder: Path, made: Adapter) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(made[0]))
    save_file(made[1], folder / "adapter_model.safetensors")
    return folder


def product(made: Adapter, module: str, scale: float) -> np.ndarray:
    stem = f"base_model.model.{module}"
    a, b = (made[1].get(f"{stem}.lora_{side}.weight") for side in "AB")
    if a is None or b is None:
        return np.zeros(SHAPES[module])
    return scale * b.astype(np.float64) @ a


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a base model and three adapters, and what each changes."""
    monkeypatch.chdir(tmp_path)
    tensors = {f"{module}.weight": np.zeros(shape, np.float32) for module, shape in SHAPES.items()}
    write_model(tmp_path / "base", tensors)
    return tmp_path


def changes(folder: Path) -> dict[str, np.ndarray]:
    """What an adapter makes of a base of zeros, as read by the loader that equals PEFT's merge."""
    merged = with_lora(open_checkpoint("base"), folder)
    return {name.removesuffix(".weight"): read_whole(source) for name, source in merged.tensors.items()}


def recipe(method: str, weights: list[float], **fields: Any) -> Recipe:
    models = [{"model": f"a{i}", "parameters": {"weight": w}} for i, w in enumerate(weights)]
    return Recipe(merge_method=method, models=models, **fields)


def test_weights_apply_to_products_whatever_the_scales_ranks_and_names(here: Path) -> None:
    q0, q1, up = SHAPES
    made = [
        adapter(2),
        adapter(3, use_rslora=True, lora_alpha=2),
        adapter(2, modules={q1: 1, up: 2}, rank_pattern={"layers.1.q_proj": 1}, alpha_pattern={"up_proj": 6}),
    ]
    scales = [dict.fromkeys(SHAPES, 2.0), dict.fromkeys(SHAPES, 2 / 3**0.5), {q0: 0.0, q1: 4.0, up: 3.0}]
    for i, one in enumerate(made):
        write(here / f"a{i}", one)
    for method, weights, factors, fields in (
        ("linear", [2.0, 1.0, 1.0], [0.5, 0.25, 0.25], {}),
        ("task_arithmetic", [1.0, -0.5, 0.3], [0.7, -0.35, 0.21], {"parameters": {"lambda": 0.7}}),
    ):
        extra = {"base_model": "org/base", **fields} if fields else {}
        merged = merge_adapters(recipe(method, weights, **extra), method, rank=7)
        found = changes(here / method)
        for module in SHAPES:
            each = [f * product(m, module, s[module]) for f, m, s in zip(factors, made, scales, strict=True)]
            np.testing.assert_allclose(found[module], sum(each), atol=1e-5)
            assert merged.errors[module] < 1e-7
        assert merged.ranks[q0] == 5 and merged.ranks[up] == 7
        stored = load_file(here / method / "adapter_model.safetensors")
        assert len(stored) == 6 and all(np.isfinite(t).all() for t in stored.values())
        config = json.loads((here / method / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "org/base" and config["task_type"] == "CAUSAL_LM"


def test_factors_themselves_are_not_averaged(here: Path) -> None:
    """Opposite factors have the same product; their mean has none."""
    config, tensors = adapter(2)
    write(here / "a0", (config, tensors))
    write(here / "a1", (config, {name: -tensor for name, tensor in tensors.items()}))
    merge_adapters(recipe("linear", [1, 1]), "out", rank=2)
    for module, found in changes(here / "out").items():
        np.testing.assert_allclose(found, product((config, tensors), module, 2.0), atol=1e-5)


def test_what_is_cut_is_the_least_there_can_be_and_is_stated(here: Path) -> None:
    made = [adapter(3), adapter(3)]
    for i, one in enumerate(made):
        write(here / f"a{i}", one)
    recipe_file = here / "merge.yaml"
    recipe_file.write_text(
        "merge_method: linear\nmodels:\n- {model: base+a0, parameters: {weight: 1}}\n"
        "- {model: a1, parameters: {weight: 1}}\n"
    )
    run = CliRunner().invoke(
        cli, ["merge", str(recipe_file), "--as-adapter", "rank=2", "--out", "out", "--json"]
    )
    assert run.exit_code == 0, run.output
    told = json.loads(run.stdout)["modules"]
    for module, found in changes(here / "out").items():
        whole = sum(product(one, module, 4 / 3) for one in made) / 2
        left, singular, right = np.linalg.svd(whole)
        np.testing.assert_allclose(found, (left[:, :2] * singular[:2]) @ right[:2], atol=1e-5)
        error = np.sqrt(np.sum(singular[2:] ** 2) / np.sum(singular**2))
        assert told[module]["rank"] == 2 and told[module]["relative_error"] == pytest.approx(error, rel=1e-6)
        assert error > 0.1
    for wrong, reason in (("rank=0", "is no rank"), ("r", "is no rank"), ("8.5", "is no rank")):
        run = CliRunner().invoke(cli, ["merge", "merge.yaml", "--as-adapter", wrong, "--out", "x"])
        assert run.exit_code == 2 and reason in run.output


@pytest.mark.parametrize("method", ["knots", "core_space", "ties"])
def test_other_operators_act_on_products(here: Path, method: str) -> None:
    made = [adapter(2), adapter(2)]
    for i, one in enumerate(made):
        write(here / f"a{i}", one)
    fields = {"base_model": "org/base", "parameters": {"density": 0.6}}
    merged = merge_adapters(recipe(method, [1.0, 0.5], **fields), "out", rank=12)
    operator = ops.OPERATORS[method](weight=[1.0, 0.5], density=0.6)
    for module, found in changes(here / "out").items():
        deltas = [{"t": product(one, module, 2.0).astype(np.float32)} for one in made]
        expected = np.asarray(operator(deltas, {"t": np.zeros(SHAPES[module], np.float32)})["t"])
        np.testing.assert_allclose(found, expected, atol=2e-5)
        assert merged.ranks[module] == (min(SHAPES[module]) if method == "ties" else 4)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, np.ndarray], str]] = {
    "dora": ({"use_dora": True}, {"q_proj.lora_magnitude_vector": np.ones(8, np.float32)}, "use_dora"),
    "bias": (
        {"bias": "all"},
        {"q_proj.base_layer.bias": np.ones(8, np.float32)},
        "q_proj.bias' stored whole",
    ),
    "lora_bias": ({"lora_bias": True}, {"q_proj.lora_B.bias": np.ones(8, np.float32)}, "lora_B.bias"),
    "saved": ({"modules_to_save": ["norm"]}, {"norm.weight": np.ones(8, np.float32)}, "norm.weight' stored"),
    "pissa": ({"init_lora_weights": "pissa"}, {}, "altered base"),
    "tokens": (
        {"trainable_token_indices": [1]},
        {"embed.token_adapter.trainable_tokens_delta": np.ones((1, 8), np.float32)},
        "trainable_token_indices",
    ),
    "rank": ({"r": 3}, {}, "where rank 3 was expected"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_product_is_refused_by_name(here: Path, kind: str) -> None:
    fields, extra, reason = REFUSED[kind]
    config, tensors = adapter(2)
    write(here / "a0", (config, tensors))
    more = {f"base_model.model.model.layers.0.{name}": value for name, value in extra.items()}
    write(here / "a1", ({**config, **fields}, {**tensors, **more}))
    with pytest.raises(CheckpointError, match="a1 cannot be merged as an adapter") as caught:
        merge_adapters(recipe("linear", [1, 1]), "out", rank=2)
    assert reason in str(caught.value)
    assert not (here / "out").exists()


def test_recipes_that_adapters_cannot_have_are_refused(here: Path) -> None:
    write(here / "a0", adapter(2))
    write(
        here / "a1", (adapter(2)[0], {k: v[:, :4] if "lora_A" in k else v for k, v in adapter(2)[1].items()})
    )
    with pytest.raises(CheckpointError, match=r"a1: module .* is changed by \[8, 4\], and by \[8, 12\]"):
        merge_adapters(recipe("linear", [1, 1]), "out", rank=2)
    with pytest.raises(RecipeError, match="it makes a tokenizer"):
        merge_adapters(recipe("linear", [1, 1], tokenizer_source="base"), "out", rank=2)
    with pytest.raises(RecipeError, match="'a7' does not exist"):
        merge_adapters(
            Recipe(merge_method="uniform", models=[{"model": "a0"}, {"model": "a7"}]), "out", rank=2
        )


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")  # peft's own
@pytest.mark.parametrize(("combination", "rank"), [("cat", 5), ("svd", 3)])
def test_peft_combines_adapters_to_the_same_products(here: Path, combination: str, rank: int) -> None:
    import peft
    import torch

    weights = [0.6, -0.3]
    made = [adapter(2, task_type=None), adapter(3, use_rslora=True, task_type=None)]
    for i, one in enumerate(made):
        write(here / f"a{i}", one)

    def layer(*names: str) -> torch.nn.Module:
        shapes = {name: SHAPES[f"model.layers.1.{name}"] for name in names}
        return torch.nn.ModuleDict({n: torch.nn.Linear(s[1], s[0], bias=False) for n, s in shapes.items()})

    network = torch.nn.ModuleDict(
        {
            "model": torch.nn.ModuleDict(
                {"layers": torch.nn.ModuleList([layer("q_proj"), layer("q_proj", "up_proj")])}
            )
        }
    )
    wrapped = peft.PeftModel.from_pretrained(network, str(here / "a0"), adapter_name="a0")
    wrapped.load_adapter(str(here / "a1"), adapter_name="a1")
    wrapped.add_weighted_adapter(["a0", "a1"], weights, "both", combination_type=combination, svd_rank=rank)
    ours = merge_adapters(recipe("task_arithmetic", weights, base_model="org/base"), "out", rank=rank)
    for module, found in changes(here / "out").items():
        theirs = wrapped.get_submodule(f"base_model.model.{module}").get_delta_weight("both").detach().numpy()
        np.testing.assert_allclose(found, theirs, atol=2e-5)
        assert (ours.errors[module] < 1e-6) == (combination == "cat")


def test_a_check_of_adapters_alone_reads_their_products(tmp_path: Path) -> None:
    made = {name: adapter() for name in ("a", "b", "loud", "other", "zero")}
    made["again"] = made["a"]
    for module in SHAPES:
        made["loud"][1][f"base_model.model.{module}.lora_B.weight"] *= 9
        made["zero"][1][f"base_model.model.{module}.lora_B.weight"] *= 0
    fewer = {name: tensor for name, tensor in made["other"][1].items() if "up_proj" not in name}
    made["other"] = ({**made["other"][0], "base_model_name_or_path": "org/other"}, fewer)
    for name, each in made.items():
        write(tmp_path / name, each)

    def found(method: str, **weights: float) -> dict[str, list[tuple[str, ...]]]:
        models = [{"model": name, "parameters": {"weight": weight}} for name, weight in weights.items()]
        base = {} if method == "linear" else {"base_model": "org/base"}
        recipe = Recipe(merge_method=method, models=models, **base)
        kinds: dict[str, list[tuple[str, ...]]] = {}
        for finding in check_recipe(recipe, base_dir=tmp_path).findings:
            kinds.setdefault(finding.kind, []).append(finding.models)
        return kinds

    assert found("linear", a=1, b=1) == {}
    assert found("task_arithmetic", a=0.5, b=0.5) == {}
    assert found("task_arithmetic", a=1, b=1) == {"strength": [()]}
    assert found("linear", a=1, again=1) == {"equal": [("a", "again")]}
    assert found("ties", a=1, b=1, loud=1, zero=1) == {"equal": [("zero",)], "outlier": [("loud",)]}
    assert found("linear", a=1, other=1) == {"base": [()], "config": [("other",)]}
    made["b"][1]["base_model.model.model.layers.0.q_proj.lora_A.weight"][0, 0] = np.nan
    save_file(made["b"][1], tmp_path / "b" / "adapter_model.safetensors")
    assert found("linear", a=1, b=1) == {"nonfinite": [("b",)]}
