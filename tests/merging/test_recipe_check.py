"""What makes a merge meaningless is found, each kind in a recipe of its own; others are left alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from safetensors.numpy import load_file

from mergelab.cli.main import cli
from mergelab.merging import Recipe, RecipeCheck, check_recipe
from tests.merging.recipes import write_model

SHAPES = {"model.embed_tokens.weight": (20, 16), "model.norm.weight": (16,)} | {
    f"model.layers.{i}.{name}.weight": (64, 64) for i in range(3) for name in ("attn", "mlp")
}
CONFIG = {"model_type": "tiny", "num_hidden_layers": 3, "vocab_size": 20, "rope_theta": 1e4}


@pytest.fixture(autouse=True)
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base, siblings of it, and models that are none."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    base = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
    changes = {"base": 0.0, "a": 0.05, "b": 0.04, "c": 0.06, "far": 0.45, "twin": 0.0, "near": 0.004}
    for name, change in changes.items():
        delta = {tensor: rng.standard_normal(x.shape) for tensor, x in base.items()}
        save(name, {t: x + change * delta[t] for t, x in base.items()})
    save("stranger", {name: rng.standard_normal(shape) for name, shape in SHAPES.items()})
    return tmp_path


def save(name: str, tensors: Mapping[str, np.ndarray], **config: Any) -> None:
    write_model(Path(name), {n: x.astype(np.float32) for n, x in tensors.items()}, config=CONFIG | config)


def check(
    method: str, *models: str, base: str | None = "base", full: bool = False, **parameters: Any
) -> RecipeCheck:
    given = {} if base is None else {"base_model": base}
    entries = [{"model": model} for model in models]
    return check_recipe(
        Recipe(merge_method=method, models=entries, parameters=parameters, **given), full=full
    )


def kinds(found: RecipeCheck) -> set[str]:
    return {finding.kind for finding in found.findings}


@pytest.mark.parametrize("full", [False, True])
def test_sound_recipes_have_no_findings(full: bool) -> None:
    assert check("task_arithmetic", "a", "b", "c", weight=0.3, full=full).findings == ()
    assert check("ties", "a", "b", weight=1.0, density=0.2, full=full).findings == ()
    assert check("linear", "a", "b", base=None, weight=1.0, full=full).findings == ()
    assert check("slerp", "b", base="a", t=0.5, full=full).findings == ()


def odd_rows() -> None:
    tensors = load_file("a/model.safetensors")
    save("odd", {**tensors, "model.embed_tokens.weight": tensors["model.embed_tokens.weight"][::-1]})


def not_finite() -> None:
    tensors = load_file("a/model.safetensors")
    tensors["model.layers.1.mlp.weight"][3] = np.nan
    save("odd", tensors)


def extended() -> None:
    tensors = load_file("a/model.safetensors")
    rows = tensors["model.embed_tokens.weight"]
    save("odd", {**tensors, "model.embed_tokens.weight": np.concatenate([rows, rows[:2]])})


def other_rope() -> None:
    save("odd", load_file("a/model.safetensors"), rope_theta=1e6)


def with_template() -> None:
    save("odd", load_file("a/model.safetensors"))
    Path("odd/chat_template.jinja").write_text("{{ messages }}")


def re_ordered() -> None:
    save("odd", load_file("a/model.safetensors"))
    for name, order in (("base", range(20)), ("odd", [1, 0, *range(2, 20)])):
        vocabulary = {f"t{number}": i for i, number in enumerate(order)}
        model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"}
        Path(name, "tokenizer.json").write_text(json.dumps({"model": model}))


MADE: dict[str, Callable[[], None]] = {
    "rows": odd_rows,
    "nonfinite": not_finite,
    "refused": extended,
    "config": other_rope,
    "chat_template": with_template,
    "vocabulary": re_ordered,
}


@pytest.mark.parametrize("kind", MADE)
def test_a_model_that_does_not_fit_is_named(kind: str) -> None:
    MADE[kind]()
    found = check("task_arithmetic", "b", "odd", weight=0.3)
    assert kinds(found) == {kind}
    assert "odd" in str(found.findings[0])


FOUND: list[tuple[str, tuple[str, ...], str | None, dict[str, Any], str, str]] = [
    ("task_arithmetic", ("a", "stranger"), "base", {"weight": 0.3}, "origin", "'stranger'"),
    ("linear", ("a", "stranger"), None, {"weight": 1.0}, "origin", "tuned from one base"),
    ("slerp", ("stranger",), "a", {"t": 0.5}, "origin", "nothing in common"),
    ("task_arithmetic", ("a", "b"), "c", {"weight": 0.3}, "base", "share a direction"),
    ("task_arithmetic", ("a", "far"), "base", {"weight": 0.3}, "outlier", "learning rate"),
    ("linear", ("a", "b", "far"), None, {"weight": 1.0}, "outlier", "'far'"),
    ("task_arithmetic", ("a", "b", "near"), "base", {"weight": 0.3}, "outlier", "drown it"),
    ("task_arithmetic", ("a", "twin"), "base", {"weight": 0.3}, "equal", "task vector is zero"),
    ("linear", ("base", "twin"), None, {"weight": 1.0}, "equal", "the same weights"),
    ("task_arithmetic", ("a", "b"), "base", {"weight": 1.0}, "strength", "add up to 2"),
    ("task_arithmetic", ("a",), "base", {"weight": 1.8}, "strength", "1.8-fold"),
    ("ties", ("a", "b"), "base", {"weight": 1.0, "density": 1.0}, "density", "drops nothing"),
    ("slerp", ("b",), "a", {"t": 0}, "weight", "one of the models"),
]


@pytest.mark.parametrize(("method", "models", "base", "parameters", "kind", "words"), FOUND)
def test_recipes_without_meaning_are_told_so(
    method: str, models: tuple[str, ...], base: str | None, parameters: dict[str, Any], kind: str, words: str
) -> None:
    found = check(method, *models, base=base, **parameters)
    assert kinds(found) == {kind}
    assert any(words in str(finding) for finding in found.findings)


def test_sums_of_shares_are_no_fault() -> None:
    """Weights that are divided by their sum, or elected, do not add up."""
    shrunk: dict[str, Any] = {"weight": 1.0, "lambda": 0.3}
    assert not check("ties", "a", "b", weight=1.0, density=0.5).findings
    assert not check("task_arithmetic", "a", "b", weight=5.0, normalize=True).findings
    assert not check("task_arithmetic", "a", "b", "c", **shrunk).findings


def test_steps_are_checked_and_results_to_come_are_not_read(family: Path) -> None:
    recipe = (
        "name: first\nmerge_method: task_arithmetic\nbase_model: base\nparameters: {weight: 0.4}\n"
        "models: [{model: a}, {model: stranger}]\n---\n"
        "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: first}, {model: b}]\n"
    )
    (family / "r.yaml").write_text(recipe)
    found = check_recipe("r.yaml")
    assert kinds(found) == {"origin"} and set(found.models) == {"a", "stranger", "base", "b"}


def test_the_status_says_whether_there_is_something(family: Path) -> None:
    def run(models: list[str], *options: str) -> Any:
        recipe = {"merge_method": "task_arithmetic", "base_model": "base", "parameters": {"weight": 0.3}}
        (family / "r.yaml").write_text(yaml.safe_dump(recipe | {"models": [{"model": m} for m in models]}))
        return CliRunner().invoke(cli, ["check", "r.yaml", *options])

    sound = run(["a", "b"])
    assert (sound.exit_code, sound.stdout.split(" in ")[0]) == (0, "nothing found"), sound.output
    odd = run(["a", "stranger"], "--json", "--full")
    assert odd.exit_code == 1
    data = json.loads(odd.stdout)
    assert data["full"] and [finding["kind"] for finding in data["findings"]] == ["origin"]
    assert data["findings"][0]["remedy"] and "base" in data["models"]
    assert run(["a", "stranger"]).stdout.startswith("origin: ")
    missing = run(["a", "nowhere"])
    assert missing.exit_code == 2 and "'nowhere' does not exist" in missing.stderr
    (family / "r.yaml").write_text("merge_method: [")
    assert CliRunner().invoke(cli, ["check", "r.yaml"]).exit_code == 2
