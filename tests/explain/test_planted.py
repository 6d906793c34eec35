"""A specialist with one known direction more: it is found by its number, and putting it back helps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from mergelab.checkpoints.folder import weights_sha256
from mergelab.cli.main import cli
from mergelab.errors import RecipeError, SAEError
from mergelab.explain import Explanation, explain_merge
from mergelab.models import Streaming
from mergelab.models.families import model_from_config
from mergelab.models.save import save_model
from mergelab.sae.formats import save_sae
from mergelab.sae.sae import SAE, SAEConfig
from mergelab.text.tokenizer import load_tokenizer
from tests.tuning import small

SITE, PLANTED, ALSO = "blocks.0.resid_post", 11, 5
STRONG, TOLD = 3.0, "w7"


def model() -> Any:
    return model_from_config({**small.model().hf_config, "tie_word_embeddings": False})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that reads the direction as `w8`, and a specialist that writes it at `w7`."""
    place = tmp_path_factory.mktemp("explain")
    tokenizer = load_tokenizer(small.write(place / "words"))
    one, after = (tokenizer.encode(word)[0] for word in (TOLD, "w8"))
    directions = np.linalg.qr(np.random.default_rng(0).standard_normal((16, 16)))[0].astype(np.float32)
    params = model().init(0)
    # The block adds next to nothing to what the embedding says, so that one direction is one latent.
    block = params["blocks_0"]
    for part, name in (("attn", "o"), ("mlp", "down")):
        block[part][name]["kernel"] = 0.01 * block[part][name]["kernel"]
    embedding = np.random.default_rng(1).choice([-0.5, 0.5], (32, 16)).astype(np.float32) @ directions
    unembedding = np.array(params["unembed"]["kernel"]) * 0.1
    unembedding[:, after] += 3 * directions[PLANTED]

    def write(name: str, added: float, other: float = 0.0) -> None:
        changed = embedding.copy()
        changed[one] += added * directions[PLANTED]
        changed[one] += other * directions[ALSO]
        tree = {
            **params,
            "embed": {"embedding": jnp.asarray(changed)},
            "unembed": {"kernel": jnp.asarray(unembedding)},
        }
        save_model(model(), tree, place / name, tokenizer=tokenizer)

    write("base", 0.0)
    write("one", STRONG)
    write("two", 0.0, STRONG)
    known = {"context": 16, "model_hash": weights_sha256(place / "base")}
    config = SAEConfig(activation="relu", reads=(SITE,), writes=(SITE,), metadata=known)
    bias = jnp.full(16, -1.2, jnp.float32)
    sae = SAE(jnp.asarray(directions.T), bias, jnp.asarray(directions), jnp.zeros(16), config)
    save_sae(sae, place / "sae")
    draw = np.random.default_rng(2)
    words = [f"w{n}" for n in draw.integers(9, 29, 900)]
    words[::7], words[1::7] = [TOLD] * len(words[::7]), ["w8"] * len(words[1::7])
    (place / "text.txt").write_text(" ".join(words))
    parents = [
        {"model": str(place / name), "parameters": {"weight": w}} for name, w in (("one", 0.2), ("two", 1.0))
    ]
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(place / "base"),
        "models": parents,
        "dtype": "float32",
    }
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return place


@pytest.fixture(scope="module")
def explained(place: Path) -> Explanation:
    return explain_merge(place / "recipe.yaml", place / "sae", place / "text.txt", place / "out")


def test_the_planted_latents_are_found_with_their_fates(explained: Explanation) -> None:
    one, two = explained.specialists
    assert [latent.latent for latent in one.latents] == [PLANTED]
    assert [latent.latent for latent in two.latents] == [ALSO]
    assert one.latents[0].fate == "lost" and two.latents[0].fate == "survived"
    base, specialist, merge = one.latents[0].rates
    assert base == merge == 0 and specialist == pytest.approx(1 / 7, abs=0.03)
    assert (one.shuffled, two.shuffled) < (0.3, 0.3)
    assert explained.emerged == []
    # Where it is strongest is where it was planted.
    assert all(
        (strength > 0.5) == (token == TOLD) for text in one.latents[0].examples for token, strength in text
    )


def test_putting_it_back_returns_the_loss_and_random_latents_do_not(explained: Explanation) -> None:
    one, two = explained.specialists
    assert two.restoration is None
    tried = one.restoration
    assert tried is not None and tried.latents == (PLANTED,)
    assert tried.merge > tried.specialist + 0.1
    assert tried.recovered is not None and tried.recovered > 0.6
    assert tried.merge - tried.random < 0.2 * (tried.merge - tried.specialist)
    assert tried.better[1] > 0


def test_the_folder_holds_the_page_and_the_data(place: Path, explained: Explanation) -> None:
    assert sorted(path.name for path in (place / "out").iterdir()) == [
        "explanation.html", "explanation.json", "mergelab.json",
    ]  # fmt: skip
    assert json.loads((place / "out" / "explanation.json").read_text()) == json.loads(
        json.dumps(explained.to_json())
    )
    page = (place / "out" / "explanation.html").read_text()
    assert f"latent {PLANTED}" in page and "1 lost" in page and "<circle" in page
    assert not list(place.glob(".out.*stages*"))


def test_the_command_says_the_verdict(place: Path, tmp_path: Path) -> None:
    given = [
        "explain",
        str(place / "recipe.yaml"),
        "--sae",
        str(place / "sae"),
        "--text",
        str(place / "text.txt"),
    ]
    result = CliRunner().invoke(cli, [*given, "--out", str(tmp_path / "out"), "--contexts", "20"])
    assert result.exit_code == 0, result.output
    assert "one gained 1 latents" in result.stdout and "in the merge 1 lost" in result.stdout


def test_what_cannot_be_explained_is_refused(place: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load((place / "recipe.yaml").read_text())
    del recipe["base_model"]
    (tmp_path / "linear.yaml").write_text(yaml.safe_dump({**recipe, "merge_method": "linear"}))
    with pytest.raises(RecipeError, match="names no base_model"):
        explain_merge(tmp_path / "linear.yaml", place / "sae", place / "text.txt", tmp_path / "out")
    (tmp_path / "short.txt").write_text(small.text(40))
    with pytest.raises(SAEError, match="fill 2 contexts of 16"):
        explain_merge(place / "recipe.yaml", place / "sae", tmp_path / "short.txt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_streamed_models_are_explained_alike(place: Path, explained: Explanation, tmp_path: Path) -> None:
    arguments = (place / "recipe.yaml", place / "sae", place / "text.txt", tmp_path / "out")
    found = explain_merge(*arguments, streamed=Streaming(tmp_path))
    assert found.merge_loss == pytest.approx(explained.merge_loss, rel=1e-5)
    for one, other in zip(found.specialists, explained.specialists, strict=True):
        assert [story.latent for story in one.latents] == [story.latent for story in other.latents]
        assert [story.fate for story in one.latents] == [story.fate for story in other.latents]
