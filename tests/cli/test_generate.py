"""`mergelab generate` continues prompts as the model does when it is called by hand."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from click.testing import CliRunner

from mergelab.cli import options
from mergelab.cli.main import cli
from mergelab.models.families import model_from_config
from mergelab.models.model import Model
from mergelab.models.save import save_model

CONFIG = {
    "model_type": "llama",
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
WORDS = [f"w{i}" for i in range(24)]


@pytest.fixture(autouse=True)
def _keep_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's JAX settings are for a process of its own, not for this one."""
    monkeypatch.setattr(options, "configure_jax", lambda: None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Any, Path]:
    """A model with strong opinions, and the folder it is saved in."""
    model = model_from_config(CONFIG)
    params = model.init(1)
    params["unembed"]["kernel"] = params["unembed"]["kernel"] * 10
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_model(model, params, folder)
    return model, params, folder


@pytest.fixture
def model(saved: tuple[Model, Any, Path], tmp_path: Path) -> tuple[Model, Any]:
    """The model, saved in `tmp_path / "model"`."""
    model, params, folder = saved
    shutil.copytree(folder, tmp_path / "model")
    return model, params


@pytest.fixture
def tokenizer(model: object, tmp_path: Path) -> None:
    """A tokenizer of 24 words beside the model, without an end of text."""
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.save(str(tmp_path / "model" / "tokenizer.json"))


def run(folder: Path, *arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(cli, ["generate", str(folder / "model"), *arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@cache
def _logits(model: Model) -> Any:
    return jax.jit(lambda params, tokens: model.apply(params, tokens).logits)


def by_hand(model: Model, params: Any, ids: list[int], count: int) -> list[int]:
    """The likeliest continuation, by whole forward passes without a cache."""
    whole = _logits(model)
    ids = list(ids)
    for _ in range(count):
        # What stands after a token does not change its logits: one length serves all steps.
        logits = whole(params, jnp.asarray([ids + [0] * (16 - len(ids))], jnp.int32))
        ids.append(int(np.argmax(logits[0, len(ids) - 1])))
    return ids[-count:]


def test_greedy_is_the_likeliest_token_each_time(model: tuple[Model, Any], tmp_path: Path) -> None:
    expected = by_hand(*model, [1, 2, 3], 6)
    result = run(tmp_path, "--token-ids", "1,2,3", "--max-new-tokens", "6", "--greedy")
    assert result["token_ids"] == expected
    assert (result["text"], result["stop"], result["prompt_token_ids"]) == (None, "length", [1, 2, 3])
    other = run(tmp_path, "--token-ids", "1,2,4", "--max-new-tokens", "6", "--greedy")
    assert other["token_ids"] != expected


def test_a_mesh_changes_nothing(model: tuple[Model, Any], tmp_path: Path) -> None:
    arguments = ["--token-ids", "1,2,3", "--max-new-tokens", "6", "--greedy"]
    assert (
        run(tmp_path, *arguments)["token_ids"]
        == run(tmp_path, *arguments, "--mesh", "data=2,tensor=4")["token_ids"]
    )


def test_seeds_decide_the_draws(model: object, tmp_path: Path) -> None:
    arguments = ["--token-ids", "1", "--max-new-tokens", "12", "--temperature", "3"]
    one, again, two = (run(tmp_path, *arguments, "--seed", seed)["token_ids"] for seed in ("1", "1", "2"))
    assert one == again != two
    certain = run(tmp_path, *arguments, "--top-k", "1")["token_ids"]
    assert certain == run(tmp_path, "--token-ids", "1", "--max-new-tokens", "12", "--greedy")["token_ids"]


def test_the_end_of_text_ends_it(model: tuple[Model, Any], tmp_path: Path) -> None:
    tokens = by_hand(*model, [1, 2, 3], 6)
    end = tokens[2]
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    arguments = ["--token-ids", "1,2,3", "--max-new-tokens", "6", "--greedy"]
    result = run(tmp_path, *arguments)
    assert result["token_ids"] == tokens[: tokens.index(end) + 1] and result["stop"] == "token"
    assert run(tmp_path, *arguments, "--ignore-end")["token_ids"] == tokens


@pytest.mark.usefixtures("tokenizer")
def test_texts_go_in_and_out(model: tuple[Model, Any], tmp_path: Path) -> None:
    tokens = by_hand(*model, [5, 7], 5)
    words = [WORDS[token] for token in tokens]
    text = " " + " ".join(words)
    arguments = ["--prompt", "w5 w7", "--max-new-tokens", "5", "--greedy"]
    result = run(tmp_path, *arguments)
    assert (result["prompt_token_ids"], result["token_ids"], result["text"]) == ([5, 7], tokens, text)
    plain = CliRunner().invoke(cli, ["generate", str(tmp_path / "model"), *arguments])
    assert plain.stdout == text + "\n"
    stopped = run(tmp_path, *arguments, "--stop", words[3])
    assert (stopped["text"], stopped["stop"]) == (text.split(words[3])[0], "string")


@pytest.mark.usefixtures("tokenizer")
def test_a_file_of_prompts_is_continued_on_a_mesh(model: tuple[Model, Any], tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("w5 w7\n\nw1\nw2 w3\n")
    arguments = ["--prompts", str(file), "--max-new-tokens", "5", "--greedy"]
    spread = ["--batch", "2", "--mesh", "data=-1"]
    split = CliRunner().invoke(cli, ["generate", str(tmp_path / "model"), *arguments, *spread])
    assert split.exit_code == 0, split.output
    lines = [json.loads(line) for line in split.stdout.splitlines()]
    assert [line["prompt"] for line in lines] == ["w5 w7", "w1", "w2 w3"]
    assert lines[0]["token_ids"] == by_hand(*model, [5, 7], 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --prompt TEXT or --token-ids"),
        (["--prompt", "a", "--token-ids", "1"], "either --prompt TEXT or --token-ids"),
        (["--token-ids", "1,x"], "is not a list of token ids"),
        (["--token-ids", "1", "--greedy", "--top-p", ".5"], "omit --top-p"),
        (["--token-ids", "99"], "token 99 is beyond the model's vocabulary of 24 (ids from 0 to 23)"),
        (["--token-ids", "1", "--prompts", "x"], "omit --prompt and --token-ids"),
        (["--token-ids", "1", "--batch", "2"], "add --prompts FILE"),
        (["--token-ids", "1", "--mesh", "model=8"], "the axes here are data, fsdp and tensor"),
        (["--token-ids", "1", "--mesh", "data=16"], "cannot be laid over 8 devices: it takes 16"),
        (["--token-ids", "1", "--stop", "x"], "--stop needs a tokenizer"),
        (["--prompt", "hello"], "has no tokenizer.json"),
    ],
)
def test_what_cannot_be_generated(arguments: list[str], message: str, model: object, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        cli, ["generate", str(tmp_path / "model"), "--max-new-tokens", "2", *arguments]
    )
    assert result.exit_code == 2
    assert message in result.stderr
