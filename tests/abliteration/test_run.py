"""From prompts and a folder to an edited folder: the command, its report, and what it refuses."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

import mergelab.abliteration
from mergelab.abliteration import decision, pipeline
from mergelab.abliteration.answers import is_refusal, refusal_tokens
from mergelab.abliteration.bundled_prompts import built_in_prompts
from mergelab.abliteration.direction_file import load_direction
from mergelab.abliteration.direction_selection import Filters
from mergelab.abliteration.pipeline import abliterate
from mergelab.abliteration.prompts import (
    Prompts,
    encode_prompts,
    post_instruction_tokens,
    read_prompts,
)
from mergelab.abliteration.settings import AbliterationSettings
from mergelab.abliteration.trial_search import Judge
from mergelab.cli.main import cli
from mergelab.errors import EvaluationError, MergelabError, OutputError, SearchError
from mergelab.models.load import load_model
from mergelab.text.tokenizer import load_tokenizer
from tests.abliteration.planted import REFUSE, Planted, prompts, text_of, write_folder


def texts(harmful: bool, seed: int = 40) -> list[str]:
    return [text_of(row) for row in prompts(40, seed + harmful, harmful)[0]]


@pytest.fixture(scope="module")
def folder(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("abliterate")
    write_folder(planted, folder / "model")
    (folder / "harmful.txt").write_text("\n".join(texts(True)) + "\n\n")
    (folder / "harmless.jsonl").write_text("\n".join(json.dumps({"prompt": t}) for t in texts(False)))
    (folder / "borderline.txt").write_text("\n".join(texts(True, 60)[:16]))
    (folder / "prose.txt").write_text(" ".join(texts(False)[:10]))
    return folder


BORDERLESS = {"borderline_refusals": None, "borderline_score": None}


def command(folder: Path, out: Path, *more: str) -> Any:
    sets = ["--harmful", str(folder / "harmful.txt"), "--harmless", str(folder / "harmless.jsonl")]
    options = ["--refusal", "Refused", "--max-depth", "1", "--batch", "8", *more]
    arguments = ["abliterate", str(folder / "model"), *sets, "--out", str(out), *options]
    return CliRunner().invoke(cli, arguments, catch_exceptions=False)


@pytest.mark.thorough
def test_the_command_writes_an_edited_folder_and_says_what_it_measured(
    planted: Planted, folder: Path, tmp_path: Path
) -> None:
    more = ["--text", str(folder / "prose.txt"), "--borderline", str(folder / "borderline.txt")]
    result = command(folder, tmp_path / "edited", "--json", *more)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    before, after = report["before"], report["after"]
    assert before["harmful_refusals"] == 1.0 and before["harmless_refusals"] == 0.0 and before["kl"] < 1e-6
    assert after["harmful_refusals"] <= 0.1 and after["harmless_refusals"] == 0.0 and 0 < after["kl"] < 0.1
    assert after["harmful_score"] < 0 < before["harmful_score"]
    assert before["loss"] > 0 and after["perplexity"] == pytest.approx(np.exp(after["loss"]))
    assert report["prompts"] == {
        "found": [24, 24, 0],
        "chosen": [8, 8, 8],
        "measured": [8, 8, 8],
    }
    assert before["borderline_refusals"] == 1.0 and after["borderline_refusals"] == 0.0
    assert report["selection"]["borderline_before"] > 0 > report["selection"]["chosen"]["borderline"]
    assert report["model"] == "model" and report["answer_tokens"] == 48
    assert report == json.loads((tmp_path / "edited" / "abliteration.json").read_text())
    card = (tmp_path / "edited" / "README.md").read_text()
    row = "| harmful prompts refused (answers with a refusal phrase) | "
    assert row + "100.0% (8 of 8; 95 % interval 67.6 to 100.0 %) |" in card
    assert report["counts"]["harmful_refusals"]["before"]["count"] == 8
    assert all(f"- {sentence}\n" in card for sentence in report["findings"])
    assert "Refusals of harmful prompts fell from 8 to " in card
    assert "Refusals of borderline prompts fell from 8 to 0 of 8" in card
    assert "On 8 harmful, 8 harmless and 8 borderline prompts that were used neither to find" in card
    assert "What this means, and what it does not" in card
    model, params = load_model(tmp_path / "edited")
    tokens, answers = prompts(128, 50, True)
    assert model == planted.model
    assert planted.shares_of(params, tokens, answers)[0] <= 0.04
    names = {path.name for path in (tmp_path / "edited").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors"} < names
    again = command(folder, tmp_path / "edited")
    assert again.exit_code == 2 and "is not empty" in again.stderr
    # The direction that lies beside the model makes the same model again, and says where it is from.
    saved = load_direction(tmp_path / "edited")
    assert saved.computed_from["prompts"] == {"harmful": 24, "harmless": 24}
    assert saved.vector.site == f"blocks.{report['selection']['chosen']['layer']}.resid_pre"
    same = command(folder, tmp_path / "same", "--direction", str(tmp_path / "edited"))
    assert same.exit_code == 0 and same.stdout.startswith("direction as given\n")
    weights = [tmp_path / name / "model.safetensors" for name in ("edited", "same")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    card = (tmp_path / "same" / "README.md").read_text()
    assert "Direction: given in a file (its file says model: " in card
    found = json.loads((tmp_path / "same" / "abliteration.json").read_text())
    assert found["after"] == {**after, "loss": None, "perplexity": None, **BORDERLESS}
    assert found["selection"] is None
    assert found["prompts"] == {"found": [0, 0], "chosen": [0, 0], "measured": [8, 8]}
    refused = command(folder, tmp_path / "x", "--direction", str(tmp_path / "edited"), "--trials", "2")
    assert refused.exit_code == 2 and "and a search for one asked for" in refused.stderr


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
    assert (
        " of a search of 6 over what is removed where, taken by the fewest refusals"
        in (tmp_path / "out" / "README.md").read_text()
    )
    assert list(dict.fromkeys(what for what, _, _ in told)) == [
        "finding directions",
        "choosing a direction",
        "searching",
        "measuring",
        "writing",
    ]
    assert [done for what, done, _ in told if what == "writing"][-1] > 0

    # Another trial is written without searching, and a trial that another search made is not.
    journal = tmp_path / "out.trials.jsonl"
    lines = journal.read_text().splitlines()
    assert len(lines) == 1 + 1 + 1 + 6  # head, selection, the unedited model, the trials
    arguments = (folder / "model", tmp_path / "third", texts(True), texts(False))
    forbid = pytest.MonkeyPatch()
    with forbid.context() as patch:
        patch.setattr(Judge, "figures", lambda *given, **options: pytest.fail("measured again"))
        patch.setattr(decision, "select_direction", lambda *given, **options: pytest.fail("chosen again"))
        third = abliterate(*arguments, settings=replace(settings, choose=3), journal=journal)
        with pytest.raises(MergelabError, match=r"trial 7 was asked for, but the search made 6"):
            abliterate(*arguments, settings=replace(settings, choose=7), journal=journal, overwrite=True)
    assert third.trial == report.search.trials[2] and third.search == report.search
    assert journal.read_text().splitlines() == lines
    assert (
        "Trial 3 of a search of 6 over what is removed where, taken by its number"
        in (tmp_path / "third" / "README.md").read_text()
    )
    saved = load_direction(tmp_path / "third")
    assert saved.ablation is not None and saved.computed_from["trial"]["number"] == 3
    np.testing.assert_array_equal(saved.ablation.mlp, third.ablation.mlp)
    with pytest.raises(OutputError, match="of another search: the settings differ"):
        abliterate(
            arguments[0],
            tmp_path / "x",
            *arguments[2:],
            settings=replace(settings, orthogonal=True),
            journal=journal,
        )


@pytest.mark.thorough
def test_a_search_in_which_no_trial_passes_keeps_its_trace(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = AbliterationSettings(
        phrases=("Refused",), filters=Filters(max_kl=0.05, max_depth=1.0), trials=2, rounds=0, batch=8
    )
    sets = texts(True), texts(False)
    abliterate(folder / "model", tmp_path / "first", *sets, settings=settings)
    # The same search, had its trials done damage: one with a KL too large, one that broke the model.
    lines = [json.loads(line) for line in (tmp_path / "first.trials.jsonl").read_text().splitlines()]
    lines[-2]["figures"][1], lines[-1]["figures"][0] = 2.5, math.nan
    journal = tmp_path / "out.trials.jsonl"
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--max-kl", "0.05", "--trials", "2"]
    # The command has no option for the rounds.
    monkeypatch.setattr(
        mergelab.abliteration, "AbliterationSettings", partial(AbliterationSettings, rounds=0)
    )
    result = command(folder, tmp_path / "out", *options)
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
    assert (
        "error: no trial has a KL of at most 0.05 (of 2 trials 1 have a KL above 0.05, 1 have a figure that "
        "is not finite; the least KL is " in result.stderr
    )
    assert f"all that was tried is in {tmp_path / 'out.trace.json'}." in result.stderr
    trace = json.loads((tmp_path / "out.trace.json").read_text())
    assert trace["failed"] == {"a KL above 0.05": 1, "a figure that is not finite": 1}
    assert [trial["kl"] for trial in trace["trials"]] == [lines[-2]["figures"][1], lines[-1]["figures"][1]]
    assert len(trace["selection"]["trace"]) == 6 and trace["baseline"]["refusal"] > 0.9
    assert journal.exists(), "another trial may be asked for by its number"
    # A fine-tune of the same shape has the same files but for their weights.
    lines[1]["selection"]["refusal_before"] += 0.5
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = command(folder, tmp_path / "out", *options)
    assert (
        result.exit_code == 2 and "is the journal of a model with other weights: the refusal" in result.stderr
    )


def test_the_prompts_that_come_with_it() -> None:
    harmful, harmless, borderline = map(built_in_prompts, ("harmful", "harmless", "borderline"))
    assert len(harmful) == len(harmless) >= 64 and len(borderline) >= 32
    everything = [*harmful, *harmless, *borderline]
    assert len({prompt.casefold() for prompt in everything}) == len(everything)
    for bad, good in zip(harmful, harmless, strict=True):  # alike in form: the verb, and about the length
        assert bad.split()[0] == good.split()[0] and abs(len(bad) - len(good)) < 35, (bad, good)
    means = [np.mean([len(prompt) for prompt in prompts]) for prompts in (harmful, harmless)]
    assert abs(means[0] - means[1]) < 3


def test_built_in_prompts_take_the_place_of_files_that_are_not_given(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, built_in = pipeline._texts(None, None, None)
    assert built_in and found["borderline"] == built_in_prompts("borderline")
    assert pipeline._texts(None, None, ["a", "b"])[0]["borderline"] == ["a", "b"]
    own, built_in = pipeline._texts(["a"] * 3 + list("bcde"), list("fghij"), None)
    assert not built_in and own["borderline"] == [] and own["harmful"] == list("abcde")
    with pytest.raises(MergelabError, match=r"4 harmful prompts \(1 repeat others\)[^$]*4 harmless prompts;"):
        pipeline._texts(list("aabcd"), list("fghi"), None)
    # Without files, those prompts are what the command takes: here, ones that the model does not refuse.
    monkeypatch.setattr(pipeline, "built_in_prompts", lambda kind: texts(kind != "harmful"))
    model = ["abliterate", str(folder / "model"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(cli, [*model, "--refusal", "Refused", "--batch", "8"])
    assert result.exit_code == 2 and "of 24 harmful prompts is" in result.stderr
    result = CliRunner().invoke(cli, [*model, "--harmful", str(folder / "harmful.txt")])
    assert result.exit_code == 2 and "harmful prompts were given without harmless ones" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_opening_that_all_answers_share_is_looked_past(folder: Path, tmp_path: Path) -> None:
    # The planted model writes "<answer>" first, whatever it is asked, where the template does not.
    shutil.copytree(folder / "model", tmp_path / "model")
    told = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    told["chat_template"] = told["chat_template"].removesuffix(" <answer>")
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(told))
    settings = AbliterationSettings(phrases=("Refused",), filters=Filters(max_depth=1.0), batch=8)
    sets = texts(True), texts(False)
    report = abliterate(tmp_path / "model", tmp_path / "out", *sets, settings=settings)
    assert (report.response_prefix, report.prefix_found) == ("<answer>", True)
    assert report.before.harmful_refusals == 1.0 and report.after.harmful_refusals == 0.0
    assert (
        "Every prompt ended with '<answer>', as all answers of the unedited model begin"
        in (tmp_path / "out" / "README.md").read_text()
    )
    with pytest.raises(EvaluationError, match="none of 3 directions passes"):
        abliterate(
            tmp_path / "model", tmp_path / "none", *sets, settings=replace(settings, response_prefix="")
        )


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
    assert report.selection is not None
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


@pytest.mark.thorough
def test_a_model_that_stays_in_its_files_is_edited_alike(folder: Path, tmp_path: Path) -> None:
    options = ["--json", "--text", str(folder / "prose.txt")]
    told = []
    for name, more in (("memory", []), ("streamed", ["--stream-layers", "--spill", str(tmp_path)])):
        result = command(folder, tmp_path / name, *options, *more)
        assert result.exit_code == 0, result.output
        told.append(json.loads(result.stdout))
    loaded, streamed = told
    one, other = (report["selection"]["chosen"] for report in (loaded, streamed))
    assert one.keys() == other.keys()
    for key, value in one.items():
        close = pytest.approx(value, rel=1e-3, abs=1e-5) if isinstance(value, float) else value
        assert other[key] == close, key
    for key in ("harmful_score", "harmless_score", "kl", "loss"):
        assert streamed["after"][key] == pytest.approx(loaded["after"][key], rel=1e-3, abs=1e-5)
    assert streamed["after"]["harmful_refusals"] is None  # no answers are generated
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("memory", "streamed")]
    for name, values in weights[0].items():
        np.testing.assert_allclose(weights[1][name], values, atol=1e-5)
    refused = command(folder, tmp_path / "x", "--stream-layers", "--trials", "2")
    assert refused.exit_code == 2 and "anew for every trial" in refused.stderr
