"""`mergelab generate --chat` answers in the model's own format, and prints the answer alone."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
from click.testing import CliRunner, Result

import mergelab as ml
from mergelab.cli import generate, options
from mergelab.cli.main import cli
from mergelab.decoding import complete
from mergelab.text import chat_ids, load_tokenizer, turn_end_ids
from tests.cli.test_generate import CONFIG

WORDS = [*(f"w{i}" for i in range(19)), "system", "user", "assistant", "<end>", "<eos>"]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture(autouse=True)
def _keep_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "configure_jax", lambda: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with strong opinions, and a tokenizer of 24 words with a chat template."""
    model = ml.model_from_config(CONFIG)
    params = model.init(5)
    params["unembed"]["kernel"] = params["unembed"]["kernel"] * 10
    path = tmp_path_factory.mktemp("chat") / "model"
    ml.save_model(model, params, path)
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<end>", "<eos>"])
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", "chat_template": TEMPLATE}))
    return path


def run(folder: Path, *arguments: str, lines: str | None = None) -> Result:
    return CliRunner().invoke(cli, ["generate", str(folder), *arguments], input=lines)


def answer(folder: Path, messages: list[dict[str, str]], count: int) -> str:
    model, params = ml.load_model(folder)
    tokenizer = load_tokenizer(folder)
    ids, ends = chat_ids(tokenizer, messages), turn_end_ids(tokenizer)
    assert ids == [WORDS.index(word) for word in " ".join(_words(messages)).split()]
    (found,) = complete(model, params, tokenizer, [ids], max_new_tokens=count, end_ids=ends)
    return found.text


def _words(messages: list[dict[str, str]]) -> list[str]:
    return [*(f"{m['role']} {m['content']} <end>" for m in messages), "assistant"]


def test_the_turns_end_is_read_off_configuration_and_template(folder: Path) -> None:
    assert turn_end_ids(load_tokenizer(folder)) == (WORDS.index("<eos>"), WORDS.index("<end>"))


def test_a_question_gets_the_answer_alone(folder: Path) -> None:
    arguments = ["--chat", "--prompt", "w3 w4", "--greedy", "--max-new-tokens", "6"]
    user = {"role": "user", "content": "w3 w4"}
    expected = answer(folder, [user], 6)
    found = run(folder, *arguments)
    assert (found.stdout, found.stderr, found.exit_code) == (expected + "\n", "", 0)
    system = run(folder, *arguments, "--system", "w9")
    assert system.stdout == answer(folder, [{"role": "system", "content": "w9"}, user], 6) + "\n"
    assert system.stdout != found.stdout
    told = json.loads(run(folder, *arguments, "--json").stdout)
    assert told["text"] == expected and len(told["prompt_token_ids"]) == 5
    library = ml.generate(
        *ml.load_model(folder), load_tokenizer(folder), ["w3 w4", [user]], max_new_tokens=6, chat=True
    )
    assert library == [expected, expected]


def test_lines_are_the_turns_of_one_conversation(folder: Path) -> None:
    found = run(folder, "--chat", "--greedy", "--max-new-tokens", "3", lines="w3\n\nw5 w6\n")
    first = [{"role": "user", "content": "w3"}]
    one = answer(folder, first, 3)
    both = [*first, {"role": "assistant", "content": one}, {"role": "user", "content": "w5 w6"}]
    two = answer(folder, both, 3)
    assert found.stdout == f"{one}\n{two}\n"
    assert two != answer(folder, both[2:], 3)  # the history matters


def test_a_conversation_ends_with_the_models_positions(folder: Path) -> None:
    found = run(folder, "--chat", "--greedy", "--max-new-tokens", "3", lines="w3 " * 62 + "\n")
    assert found.exit_code == 2 and found.stdout == ""
    assert "has 65 tokens, which leaves no room for an answer within the model's 64 positions" in found.stderr


def test_plain_prompts_of_a_chat_model_get_a_hint(folder: Path) -> None:
    arguments = ["--greedy", "--max-new-tokens", "2"]
    assert "--chat puts the prompt as a question" in run(folder, "--prompt", "w1", *arguments).stderr
    rendered = run(folder, "--prompt", "user w1 <end> assistant <eos>", *arguments)
    assert (rendered.exit_code, rendered.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chat", "--token-ids", "1"], "--chat takes a text"),
        (["--system", "w1", "--prompt", "w2"], "--system is the instruction of a chat: add --chat"),
        (["--chat", "--prompt", " "], "the prompt is empty"),
        (["--prompt", ""], "the prompt is empty"),
        (["--chat", "--prompt", "w1", "--max-new-tokens", "99"], "more than the model's 64 positions"),
    ],
)
def test_what_cannot_be_asked(folder: Path, arguments: list[str], message: str) -> None:
    found = run(folder, *arguments)
    assert found.exit_code == 2 and message in found.stderr and found.stdout == ""


def test_a_conversation_in_several_processes_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "current_run", lambda: SimpleNamespace(processes=2))
    result = run(folder, "--chat", lines="w1")
    assert result.exit_code == 2
    assert "a conversation is held with one process, and this run has 2" in result.stderr
    assert run(folder, "--chat", "--prompt", "w1", "--max-new-tokens", "1", "--greedy").exit_code == 0


def test_a_model_without_a_template_and_a_missing_folder_are_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    assert "has no chat template; omit --chat" in run(tmp_path, "--chat", "--prompt", "w1").stderr
    missing = run(tmp_path / "nowhere", "--prompt", "w1")
    assert missing.exit_code == 2 and "nowhere does not exist; name the folder" in missing.stderr


def test_pieces_of_text_are_shown_once_and_never_taken_back(folder: Path) -> None:
    model, params = ml.load_model(folder)
    tokenizer: Any = load_tokenizer(folder)
    pieces: list[str] = []
    asked: dict[str, Any] = {"max_new_tokens": 12, "end_ids": ()}
    (free,) = complete(model, params, tokenizer, "w3 w4", on_text=pieces.append, **asked)
    assert "".join(pieces) == free.text and len(pieces) > 3
    shown: list[str] = []
    stop = free.text[5:11]
    (cut,) = complete(model, params, tokenizer, "w3 w4", on_text=shown.append, stop_strings=stop, **asked)
    assert "".join(shown) == cut.text == free.text[: free.text.index(stop)]
