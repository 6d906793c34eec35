"""The quickstart end to end at its smallest size: complete outputs, a cached second run, clear refusals."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from mergelab.cli.main import cli
from mergelab.merging.recipe.recipe_file import load_recipe
from mergelab.operators import OPERATORS
from mergelab.quickstart import small_llama
from mergelab.quickstart.corpus import DOMAINS
from mergelab.quickstart.experiment import copy_recipe
from mergelab.quickstart.family import checkpoint_steps
from mergelab.quickstart.presets import ALL_RECIPES, PRESETS
from mergelab.shipped import shipped_folder
from tests.hub_server import card_errors

MODEL_FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "README.md",
    "tokenizer.json",
    "tokenizer_config.json",
}


def quickstart(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["quickstart", "--preset", "tiny", *arguments])


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    out = tmp_path_factory.mktemp("quickstart") / "out"
    result = quickstart("--out", str(out))
    assert result.exit_code == 0, result.output
    return SimpleNamespace(out=out, result=result, data=json.loads((out / "results.json").read_text()))


def test_every_output_is_there(done: SimpleNamespace) -> None:
    models = {path.name for path in (done.out / "models").iterdir()}
    merges = {path.name for path in (done.out / "merges").iterdir()}
    assert models == {"base", *DOMAINS}
    assert merges == set(PRESETS["tiny"].recipes)
    for folder in (*(done.out / "models").iterdir(), *(done.out / "merges").iterdir()):
        assert {path.name for path in folder.iterdir()} >= MODEL_FILES
    for name in ("results.json", "figure.png", "figure.svg", "report.html"):
        assert (done.out / name).stat().st_size > 1000


def test_cards_are_accepted_by_the_hub_and_files_name_no_place_of_this_machine(done: SimpleNamespace) -> None:
    cards = [*(done.out / "models").rglob("README.md"), *(done.out / "merges").rglob("README.md")]
    for card in [*cards, done.out / "sae" / "final" / "README.md"]:
        assert card_errors(card.read_text()) == []
    assert str(done.out) not in (done.out / "sae" / "final" / "cfg.json").read_text()


def test_the_table_holds_the_numbers_and_the_verdict(done: SimpleNamespace) -> None:
    assert [score["name"] for score in done.data["scores"]] == ["base", *DOMAINS, *PRESETS["tiny"].recipes]
    for score in done.data["scores"]:
        line = next(line for line in done.result.output.splitlines() if line.startswith(f"{score['name']} "))
        assert all(f"{score['bits'][domain]:.3f}" in line for domain in DOMAINS)
        assert f"{score['mean']:.3f}" in line
    shown = done.result.stdout.split("report   ")[0].splitlines()
    assert max(map(len, shown)) <= 80 and len(shown) > 12
    assert "takes about a minute" in done.result.stderr and "Try next:" in done.result.stdout
    output = " ".join(done.result.output.split())
    for sentence in done.data["verdict"]:
        assert sentence in output


def test_learning_took_place(done: SimpleNamespace) -> None:
    scores = {score["name"]: score["bits"] for score in done.data["scores"]}
    for domain in DOMAINS:
        assert scores["base"][domain] < 8
        assert scores[domain][domain] < scores["base"][domain]


def test_the_merge_is_the_merge_of_these_models(done: SimpleNamespace) -> None:
    models = [load_file(done.out / "models" / domain / "model.safetensors") for domain in DOMAINS]
    merged = load_file(done.out / "merges" / "linear" / "model.safetensors")
    assert merged.keys() == models[0].keys()
    for name, tensor in merged.items():
        np.testing.assert_allclose(tensor, sum(m[name] for m in models) / 3, rtol=0, atol=1e-6)
        assert not np.array_equal(tensor, models[0][name])


def test_the_autoencoder_explains_the_base_model_and_is_shown_in_the_text(done: SimpleNamespace) -> None:
    settings = PRESETS["tiny"].autoencoder
    weights = load_file(done.out / "sae" / "final" / "sae.safetensors")
    assert weights["W_dec"].shape == (settings.n_latents, PRESETS["tiny"].model.hidden_size)
    figures, latents = done.data["features"]["figures"], done.data["features"]["latents"]
    assert figures["nmse"] < 0.6 and figures["l0"] <= settings.k
    assert f"{figures['nmse']:.1%}" in done.result.output
    assert latents
    for latent in latents:
        strengths = [max(strength for _, strength in example) for example in latent["examples"]]
        assert strengths == sorted(strengths, reverse=True) and strengths[0] == pytest.approx(1, abs=1e-4)


@pytest.mark.slow
def test_its_checkpoints_say_what_training_the_autoencoder_is_worth(done: SimpleNamespace) -> None:
    steps = checkpoint_steps(PRESETS["tiny"].base.steps)
    assert {path.name for path in (done.out / "checkpoints").iterdir()} == {str(step) for step in steps}
    assert steps[-1] == PRESETS["tiny"].base.steps and 6 <= len(steps) <= 8
    last, base = (
        done.out / path / "model.safetensors" for path in (f"checkpoints/{steps[-1]}", "models/base")
    )
    assert last.read_bytes() == base.read_bytes()
    asked = ["sae", "eval", done.out / "sae", "--model", done.out / "models" / "base", "--json"]
    asked += ["--text", done.out / "held-out.txt", "--curve", done.out / "checkpoints", "--context", 32]
    result = CliRunner().invoke(cli, [str(word) for word in [*asked, "--metrics", "downstream"]])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["host_checked"]
    assert 0 < found["dictionaries"][str(done.out / "sae")]["downstream.compute_equivalent"]["value"] < 1


def test_checkpoints_are_evenly_spaced_in_the_logarithm() -> None:
    assert checkpoint_steps(400) == (5, 9, 17, 33, 61, 114, 214, 400)
    assert checkpoint_steps(3) == (1, 2, 3) and checkpoint_steps(1) == (1,)


def test_a_merge_is_a_model_with_its_tokenizer(done: SimpleNamespace) -> None:
    config, _ = small_llama.load(done.out / "merges" / "slerp")
    assert config == PRESETS["tiny"].model
    tokenizer = Tokenizer.from_file(str(done.out / "merges" / "slerp" / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == config.vocab_size


@pytest.mark.oracle
def test_transformers_loads_base_and_merge_with_equal_logits(done: SimpleNamespace) -> None:
    import torch
    import transformers

    for folder in (done.out / "models" / "base", done.out / "merges" / "linear"):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tokens = np.array(tokenizer("def f(self):\n    return self.x")["input_ids"], np.int32)[None]
        with torch.no_grad():
            expected = theirs(torch.tensor(tokens, dtype=torch.int64)).logits.numpy()
        config, params = small_llama.load(folder)
        found = np.asarray(small_llama.apply(config, params, jnp.asarray(tokens)))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
        assert (found.argmax(-1) == expected.argmax(-1)).all()


def test_the_page_is_self_contained(done: SimpleNamespace) -> None:
    page = (done.out / "report.html").read_text()
    for needle in ('src="http', 'href="http', "url(http", "<script", "<link", "@import"):
        assert needle not in page
    assert page.count("data:image/svg+xml;base64,") == 2
    assert all(name in page for name in PRESETS["tiny"].recipes)


def test_a_second_run_is_cached_and_says_the_same(done: SimpleNamespace) -> None:
    before = {path: path.stat().st_mtime_ns for path in done.out.rglob("*.safetensors")}
    again = quickstart("--out", str(done.out), "--json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout) == done.data
    assert {path: path.stat().st_mtime_ns for path in done.out.rglob("*.safetensors")} == before


def test_a_removed_merge_alone_is_made_again_with_the_same_bytes(done: SimpleNamespace) -> None:
    weights = done.out / "merges" / "linear" / "model.safetensors"
    trained = (done.out / "models" / "base" / "model.safetensors").stat().st_mtime_ns
    before = weights.read_bytes()
    for path in weights.parent.iterdir():
        path.unlink()
    weights.parent.rmdir()
    assert quickstart("--out", str(done.out)).exit_code == 0
    assert weights.read_bytes() == before
    assert (done.out / "models" / "base" / "model.safetensors").stat().st_mtime_ns == trained


def test_a_foreign_folder_and_a_wrong_preset_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    refused = quickstart("--out", str(tmp_path))
    assert refused.exit_code == 2
    assert "was not written by the quickstart" in refused.output
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert "'huge' is not one of 'default', 'tiny'" in quickstart("--preset", "huge").output


@pytest.mark.parametrize("name", ALL_RECIPES)
def test_the_quickstart_recipes_are_valid_and_name_its_models(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(copy_recipe(name, tmp_path))
    assert recipe.merge_method in OPERATORS
    assert set(recipe.model_texts()) <= {f"../models/{model}" for model in ("base", *DOMAINS)}


def test_no_quickstart_recipe_is_forgotten() -> None:
    assert {path.stem for path in shipped_folder("quickstart").glob("*.yaml")} == set(ALL_RECIPES)


def test_the_example_recipes_are_valid_and_listed(repository: Path) -> None:
    folder = repository / "configs" / "recipes"
    listed = (folder / "README.md").read_text()
    recipes = {path.name: load_recipe(path) for path in sorted(folder.glob("*.yaml"))}
    assert len(recipes) >= 10
    for name, recipe in recipes.items():
        assert f"`{name}`" in listed
        assert recipe.merge_method in OPERATORS
