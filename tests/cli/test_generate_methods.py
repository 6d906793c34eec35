"""`mergelab generate` with samples, a draft, beams, thinking, token sets, edits and triggers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from click.testing import CliRunner

import mergelab as ml
from mergelab.cli import options
from mergelab.cli.main import cli
from mergelab.decoding import Temperature, beam_search, complete, sample
from mergelab.interp import SteeringVector, clamp
from mergelab.models.families import model_from_config
from mergelab.models.model import Model
from mergelab.models.save import save_model
from mergelab.sae.sae import SAE, SAEConfig

CONFIG = {
    "model_type": "llama",
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
SITE, WARM, NEW = "blocks.1.resid_post", ["--temperature", "2"], ["--max-new-tokens", "8"]
PROMPT = ["--prompt", "w5 w7"]


@pytest.fixture(autouse=True)
def _keep_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's JAX settings are for a process of its own, not for this one."""
    monkeypatch.setattr(options, "configure_jax", lambda: None)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that has strong opinions and 24 words, and what goes with it."""
    folder = tmp_path_factory.mktemp("place")
    model = model_from_config(CONFIG)
    params = model.init(1)
    params["unembed"]["kernel"] = params["unembed"]["kernel"] * 10
    words = {f"w{i}": i for i in range(24)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    for name, scale in (("model", 1.0), ("draft", 1.1)):
        save_model(model, jax.tree.map(lambda x, by=scale: x * by, params), folder / name)
        backend.save(str(folder / name / "tokenizer.json"))
    shutil.copytree(folder / "draft", folder / "turned")
    turned = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"w{23 - i}": i for i in range(24)}, unk_token="w0")
    )
    turned.save(str(folder / "turned" / "tokenizer.json"))
    for name, size in (("small", 20), ("filled", 32)):
        other = model_from_config({**CONFIG, "vocab_size": size})
        its = other.init(1)
        its["unembed"]["kernel"] = its["unembed"]["kernel"].at[:, 24:].set(100.0)  # what it must not propose
        save_model(other, its, folder / name)
    backend.save(str(folder / "filled" / "tokenizer.json"))
    rng = np.random.default_rng(0)
    w = rng.normal(0, 1, (16, 12)).astype(np.float32)
    arrays = {name: jnp.asarray(x) for name, x in {"W_enc": w, "W_dec": w.T / 16}.items()}
    zeros = {"b_enc": jnp.zeros(12), "b_dec": jnp.zeros(16)}
    config = SAEConfig(activation="relu", metadata={"site": SITE})
    ml.save_sae(SAE(**arrays, **zeros, config=config), folder / "sae")
    vector = SteeringVector(jnp.asarray(w[:, 0]), jnp.float32(2.0), SITE, "llama")
    ml.save_steering(vector, folder / "vector.gguf")
    return folder


@pytest.fixture(scope="module")
def loaded(place: Path) -> tuple[Model, Any, Any]:
    return *ml.load_model(place / "model"), ml.load_tokenizer(place / "model")


def run(place: Path, *arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(cli, ["generate", str(place / "model"), *PROMPT, *NEW, *arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_samples_of_a_prompt(place: Path, loaded: tuple[Model, Any, Any]) -> None:
    model, params, tokenizer = loaded
    found = run(place, "--samples", "3", *WARM, "--seed", "4")
    done = complete(
        model, params, tokenizer, ["w5 w7"], max_new_tokens=8, samples=3, key=4, log_probs=True,
        sampler=sample(Temperature(2.0)),
    )  # fmt: skip
    assert found["prompt_token_ids"] == [5, 7]
    assert [one["token_ids"] for one in found["samples"]] == [list(one.token_ids) for one in done]
    assert [one["text"] for one in found["samples"]] == [one.text for one in done]
    told = [one["log_probability"] for one in found["samples"]]
    np.testing.assert_allclose(told, [one.log_probability for one in done], rtol=1e-5)
    assert len(set(told)) == 3
    arguments = ["generate", str(place / "model"), *PROMPT, *NEW, "--samples", "3", *WARM, "--seed", "4"]
    plain = CliRunner().invoke(cli, arguments)
    assert plain.stdout == "\n---\n".join(one.text for one in done) + "\n"


def test_a_draft_changes_no_greedy_text_and_beams_are_those_of_the_search(
    place: Path, loaded: tuple[Model, Any, Any]
) -> None:
    alone = run(place, "--greedy")
    found = run(place, "--greedy", "--draft", str(place / "draft"))
    told = found.pop("draft")
    assert found == alone and 0 < told["passes"] < 8 and told["accepted"] > 0
    filled = run(place, "--greedy", "--draft", str(place / "filled"))
    assert filled.pop("draft")["passes"] > 0 and filled == alone
    beams = run(place, "--beams", "3")
    best = beam_search(*loaded[:2], [[5, 7]], max_new_tokens=8, beams=3)
    assert [one["token_ids"] for one in beams["beams"]] == best.rows()
    assert beams["token_ids"] == best.rows()[0] and beams["text"] == beams["beams"][0]["text"]
    assert beams["beams"][0]["score"] == pytest.approx(float(best.scores[0, 0]), abs=1e-5)


def test_thinking_is_forced(place: Path) -> None:
    free = run(place, "--greedy")["token_ids"]
    end = f"w{free[2]}"
    start = next(place for place, token in enumerate(free) if end in f"w{token}")
    found = run(
        place,
        "--greedy",
        "--think-end",
        end,
        "--think-min",
        "5",
        "--think-max",
        "6",
        "--think-more",
        "w9 w11",
    )
    assert found["token_ids"][: start + 2] == [*free[:start], 9, 11]
    words = found["text"].split()
    assert 5 <= next(place for place, word in enumerate(words) if end in word) <= 6 and len(words) == 8
    samples = run(place, "--samples", "2", *WARM, "--think-end", "w3", "--think-max", "4")["samples"]
    assert all("w3" in one["text"].split()[:5] for one in samples)


def test_words_are_promoted_and_banned(place: Path) -> None:
    free = run(place, "--greedy")["token_ids"]
    banned = run(place, "--greedy", "--ban", f"w{free[0]}", "--promote", "w13=1000")["token_ids"]
    assert free[0] not in banned and set(banned) == {13}


def test_edits_and_triggers(place: Path, loaded: tuple[Model, Any, Any]) -> None:
    model, params, tokenizer = loaded
    sae, vector = ml.load_sae(place / "sae"), ml.load_steering(place / "vector.gguf")[SITE]
    free = run(place, "--greedy")
    steer, clamped = f"--steer={place / 'vector.gguf'}=", f"--clamp-latent={place / 'sae'}:"
    for arguments, edit in (
        ([f"{steer}4"], vector.edit(4.0)),
        ([f"{clamped}3=60", f"{clamped}5=2"], clamp(sae, [3, 5], [60.0, 2.0])),
    ):
        (done,) = complete(model, params, tokenizer, ["w5 w7"], max_new_tokens=8, edit={SITE: edit})
        found = run(place, "--greedy", *arguments)["token_ids"]
        assert found == list(done.token_ids) != free["token_ids"]
    both = run(
        place, "--greedy", "--steer", f"{place / 'vector.gguf'}=4", "--steer", f"{place / 'vector.gguf'}=-4"
    )
    assert both["token_ids"] == free["token_ids"]
    watched = run(place, "--greedy", "--stop-when", f"{place / 'sae'}:3,5>1000")
    readings = watched["latents"]
    assert watched["token_ids"] == free["token_ids"] and set(readings) == {
        f"{place / 'sae'}:{n}" for n in (3, 5)
    }
    highest = np.max(list(readings.values()), axis=0)
    bound = float(np.sort(highest)[-2]) + 1e-4
    ended = run(place, "--greedy", "--stop-when", f"{place / 'sae'}:3,5>{bound}")
    assert (
        ended["token_ids"] == free["token_ids"][: int(np.argmax(highest)) + 1] and ended["stop"] == "latent"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "0"], "0 is not in the range"),
        (["--samples", "2", "--greedy"], "--greedy gives one text: omit --samples"),
        (["--beams", "2", "--samples", "2"], "--beams does not go with --samples"),
        (["--think-min", "2"], "add --think-end TEXT"),
        (["--think-end", "w3", "--think-min", "3", "--think-max", "2"], "--think-max 2 is less than"),
        (["--think-end", "w3", "--think-max", "8"], "are 9, more than the 8 new tokens"),
        (["--think-end", "w3", "--think-more", "w3 w4"], "--think-more holds --think-end"),
        (["--ban", ""], "--ban is empty"),
        (["--promote", "w3"], "is not TEXT=STRENGTH, with a finite number"),
        (["--promote", "w3=nan"], "is not TEXT=STRENGTH, with a finite number"),
        (["--clamp-latent", "sae:x=3"], "is not SAE:ID=VALUE"),
        (["--clamp-latent", "SAE:12=3"], "latent 12 does not exist: the SAE has 12"),
        (["--stop-when", "SAE:1,99>4"], "latent 99 does not exist: the SAE has 12"),
        (["--stop-when", "SAE:1>x"], "is not SAE:ID,...>VALUE"),
        (["--steer", "missing.gguf=1"], "missing.gguf"),
        (["--draft", "SMALL"], "the draft has a vocabulary of 20 tokens and"),
        (["--draft", "SMALL"], "no two tokenizers that say"),
        (["--draft", "TURNED"], "24 tokens have other ids than in"),
        (["--samples", "2", "--max-new-tokens", "63"], "more than the model's 64 positions"),
    ],
)  # fmt: skip
def test_what_cannot_be_done(arguments: list[str], message: str, place: Path) -> None:
    for name in ("sae", "small", "turned"):
        arguments = [
            argument.replace(name.upper(), str(place / name)) if "SAE:ID" not in argument else argument
            for argument in arguments
        ]
    result = CliRunner().invoke(cli, ["generate", str(place / "model"), *PROMPT, *NEW, *arguments])
    assert result.exit_code in (1, 2)
    assert message in " ".join(result.stderr.split()) and result.stdout == ""


def test_methods_are_of_one_prompt(place: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("w5\n")
    arguments = [
        "generate",
        str(place / "model"),
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--samples",
        "2",
    ]
    result = CliRunner().invoke(cli, arguments)
    assert (
        result.exit_code == 2 and "--samples is of one prompt and not of a file of prompts" in result.stderr
    )
