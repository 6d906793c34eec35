"""From prompts and a folder to an edited folder: the command, its report, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mergelab.abliteration.answers import is_refusal, refusal_tokens
from mergelab.abliteration.direction_selection import Filters
from mergelab.abliteration.pipeline import abliterate
from mergelab.abliteration.prompts import (
    Prompts,
    encode_prompts,
    post_instruction_tokens,
    read_prompts,
)
from mergelab.abliteration.settings import AbliterationSettings
from mergelab.cli.main import cli
from mergelab.errors import EvaluationError, MergelabError, SearchError
from mergelab.models.load import load_model
from mergelab.text.tokenizer import load_tokenizer
from tests.abliteration.planted import REFUSE, Planted, prompts, text_of, write_folder


def texts(harmful: bool) -> list[str]:
    return [text_of(row) for row in prompts(40, 40 + harmful, harmful)[0]]


@pytest.fixture(scope="module")
def folder(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("abliterate")
    write_folder(planted, folder / "model")
    (folder / "harmful.txt").write_text("\n".join(texts(True)) + "\n\n")
    (folder / "harmless.jsonl").write_text("\n".join(json.dumps({"prompt": t}) for t in texts(False)))
    (folder / "prose.txt").write_text(" ".join(texts(False)[:10]))
    return folder


def command(folder: Path, out: Path, *more: str) -> Any:
    sets = ["--harmful", str(folder / "harmful.txt"), "--harmless", str(folder / "harmless.jsonl")]
    options = ["--refusal", "Refused", "--max-depth", "1", "--batch", "8", *more]
    arguments = ["abliterate", str(folder / "model"), *sets, "--out", str(out), *options]
    return CliRunner().invoke(cli, arguments, catch_exceptions=False)


def test_the_command_writes_an_edited_folder_and_says_what_it_measured(
    planted: Planted, folder: Path, tmp_path: Path
) -> None:
    result = command(folder, tmp_path / "edited", "--json", "--text", str(folder / "prose.txt"))
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    before, after = report["before"], report["after"]
    assert before["harmful_refusals"] == 1.0 and before["harmless_refusals"] == 0.0 and before["kl"] < 1e-6
    assert after["harmful_refusals"] <= 0.1 and after["harmless_refusals"] == 0.0 and 0 < after["kl"] < 0.1
    assert after["harmful_score"] < 0 < before["harmful_score"]
    assert before["loss"] > 0 and after["perplexity"] == pytest.approx(np.exp(after["loss"]))
    assert report["prompts"] == {"found": [24, 24], "chosen": [8, 8], "measured": [8, 8]}
    assert report == json.loads((tmp_path / "edited" / "abliteration.json").read_text())
    card = (tmp_path / "edited" / "README.md").read_text()
    row = "| harmful prompts refused (answers with a refusal phrase) | "
    assert row + "100.0% (8 of 8; 95 % interval 67.6 to 100.0 %) |" in card
    assert report["counts"]["harmful_refusals"]["before"]["count"] == 8
    assert all(f"- {sentence}\n" in card for sentence in report["findings"])
    assert "Refusals of harmful prompts fell from 8 to " in card
    assert "What this means, and what it does not" in card
    model, params = load_model(tmp_path / "edited")
    tokens, answers = prompts(128, 50, True)
    assert model == planted.model
    assert planted.shares_of(params, tokens, answers)[0] <= 0.04
    names = {path.name for path in (tmp_path / "edited").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors"} < names
    again = command(folder, tmp_path / "edited")
    assert again.exit_code == 2 and "is not empty" in again.stderr


def test_a_search_chooses_what_is_written(folder: Path, tmp_path: Path) -> None:
    settings = AbliterationSettings(
        phrases=("Refused",), filters=Filters(max_kl=0.05, max_depth=1.0), trials=6, rounds=0, batch=8
    )
    told: list[tuple[str, int, int]] = []
    report = abliterate(
        folder / "model",
        tmp_path / "out",
        texts(True),
        texts(False),
        settings=settings,
        progress=lambda *what: told.append(what),
    )
    assert report.trial is not None and report.search is not None
    assert report.trial.kl <= 0.05 and len(report.search.trials) == 6
    assert report.after.harmful_refusals is not None and report.after.harmful_refusals <= 0.1
    found = report.to_json()
    assert found["search"]["chosen"]["parameters"] == dict(report.trial.parameters)
    assert len(found["weights"]["mlp"]) == 4
    assert "A search of 6 trials" in (tmp_path / "out" / "README.md").read_text()
    assert list(dict.fromkeys(what for what, _, _ in told)) == [
        "finding directions",
        "choosing a direction",
        "searching",
        "measuring",
        "writing",
    ]
    assert [done for what, done, _ in told if what == "writing"][-1] > 0


def test_nothing_is_written_where_no_direction_passes(folder: Path, tmp_path: Path) -> None:
    settings = AbliterationSettings(phrases=("Refused",), filters=Filters(min_induced=99.0), batch=8)
    where = re.escape(str(tmp_path / "out.trace.json"))
    with pytest.raises(SearchError, match=f"passes the filters.*all that was tried is in {where}") as caught:
        abliterate(folder / "model", tmp_path / "out", texts(True), texts(False), settings=settings)
    trace = json.loads((tmp_path / "out.trace.json").read_text())
    tried = len(trace["trace"])
    assert f"none of {tried} directions" in str(caught.value)
    assert trace["failed"]["an induced refusal below 99"] == tried
    assert f"{tried} have an induced refusal below 99" in str(caught.value)
    (tmp_path / "out.trace.json").unlink()
    with pytest.raises(MergelabError, match="4 harmful prompts; give at least 5"):
        abliterate(folder / "model", tmp_path / "out", texts(True)[:4], texts(False))
    assert not list(tmp_path.iterdir())


def test_a_model_that_does_not_refuse_is_told_before_the_search(folder: Path, tmp_path: Path) -> None:
    settings = AbliterationSettings(phrases=("Refused",), filters=Filters(max_depth=1.0), batch=8)
    told: list[str] = []
    with pytest.raises(EvaluationError, match=r"does not seem to refuse: .* 24 harmful prompts") as caught:
        abliterate(
            folder / "model",
            tmp_path / "out",
            texts(False),  # what it answers, as if it were harmful
            texts(True),
            settings=settings,
            progress=lambda what, done, total: told.append(what),
        )
    assert "and 0 and 24 of them begin with a refusal;" in str(caught.value)
    assert set(told) == {"finding directions"} and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("2-9", "layers 2-9 were asked for, but the model has layers 0-3"),
        ("3-1", "'3-1' is not a range of layers"),
        ("last", "'last' is not a range of layers"),
        ("-1", "'-1' is not a range of layers"),
    ],
)
def test_layers_that_a_model_lacks_are_refused(
    folder: Path, tmp_path: Path, layers: str, message: str
) -> None:
    result = command(folder, tmp_path / "out", f"--layers={layers}")
    assert result.exit_code == 2 and message in result.stderr and not list(tmp_path.iterdir())


def test_candidates_come_from_the_layers_asked_for(folder: Path, tmp_path: Path) -> None:
    settings = AbliterationSettings(
        phrases=("Refused",), filters=Filters(layers=(1, 2), max_kl=9), trials=5, rounds=1, batch=8
    )
    report = abliterate(folder / "model", tmp_path / "out", texts(True), texts(False), settings=settings)
    assert {candidate.layer for candidate in report.selection.trace} == {1, 2}
    assert report.search is not None
    points = [trial.parameters for trial in report.search.trials]
    assert all(1 <= point["source"] <= 2 and point["own"] == 0 for point in points)


def test_a_prefix_of_answers_ends_every_prompt(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "model")
    plain = encode_prompts(tokenizer, texts(True))
    longer = encode_prompts(tokenizer, texts(True), response_prefix=" Never .\n")
    np.testing.assert_array_equal(longer.tokens[:, :-2], plain.tokens)
    assert tokenizer.decode(longer.tokens[0, -2:].tolist()) == "Never ."
    assert post_instruction_tokens(tokenizer, longer) == 1
    assert post_instruction_tokens(tokenizer, longer, response_prefix=" Never .\n") == 4


def test_prompts_come_in_the_models_chat_format(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder / "model")
    tokens, _ = prompts(40, 41, True)
    encoded = encode_prompts(tokenizer, read_prompts(folder / "harmful.txt"))
    np.testing.assert_array_equal(encoded.tokens, tokens)
    assert post_instruction_tokens(tokenizer, encoded) == 2
    assert post_instruction_tokens(tokenizer, Prompts(tokens[:, 1:-1], encoded.mask[:, 2:])) == 1
    assert refusal_tokens(tokenizer, ["Refused"]) == [REFUSE]
    assert read_prompts(folder / "harmless.jsonl") == texts(False)
    (tmp_path / "bad.jsonl").write_text('"fine"\n{"instruction": "no"}\n')
    with pytest.raises(MergelabError, match=r"bad\.jsonl, line 2"):
        read_prompts(tmp_path / "bad.jsonl")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(MergelabError, match="holds no prompts"):
        read_prompts(tmp_path / "empty.txt")
    with pytest.raises(MergelabError, match="cannot be read"):
        read_prompts(tmp_path / "missing.txt")


def test_prompts_are_cut_into_equal_batches_and_sets() -> None:
    found = Prompts.of([[n + 1] * (n % 3 + 1) for n in range(7)])
    batches = list(found.batches(3))
    assert [batch.real for batch in batches] == [3, 3, 1]
    assert {batch.tokens.shape for batch in batches} == {(3, 3)}
    rows = [row for b in batches for row in Prompts(b.tokens[: b.real], b.mask[: b.real]).rows()]
    assert rows == found.rows() and found.shortest == 1
    first, rest = found.split(0.6)
    assert len(first) == 4 and len(rest) == 3
    assert sorted(map(tuple, found.shuffled(1).rows())) == sorted(map(tuple, found.rows()))
    with pytest.raises(MergelabError, match="cannot be split"):
        Prompts.of([[1]]).split(0.5)


def test_refusals_are_known_by_their_phrases() -> None:
    assert is_refusal("I\N{RIGHT SINGLE QUOTATION MARK}m SORRY, no.")
    assert not is_refusal("Of course! First, ...")
    assert is_refusal("Das kann ich nicht.", ["kann ich nicht"])
