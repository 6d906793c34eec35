"""What is measured of a model, beside its logits; recipes and adapters; faults before anything is loaded."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
from click.testing import CliRunner

import mergelab as ml
from mergelab.cli.main import cli
from mergelab.verdict import evaluation, held_out_text, read_held_out, read_tasks, score_answers

CONTEXT = 8
Loaded = tuple[ml.Model, Any, ml.Tokenizer]


@pytest.fixture(scope="module")
def loaded(place: Path) -> Loaded:
    return *ml.load_model(place / "one"), ml.load_tokenizer(place / "one")


@pytest.fixture(scope="module")
def log_p(loaded: Loaded) -> Any:
    """Log-probabilities `[length, vocab]` of a list of ids, float64, from logits of a padded row."""
    forward = jax.jit(loaded[0].apply)

    def of(ids: Any) -> np.ndarray:
        row = np.zeros((1, 16), np.int32)
        row[0, : len(ids)] = ids
        logits = np.asarray(forward(loaded[1], row).logits)[0, : len(ids)].astype(np.float64)
        top = logits.max(axis=1, keepdims=True)
        return logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))

    return of


def test_every_token_counts_once_with_its_bytes(place: Path, loaded: Loaded, log_p: Any) -> None:
    found = ml.evaluate_model(*loaded, text=place / "docs.jsonl", context=CONTEXT, batch=4)
    texts = [json.loads(line)["text"] for line in (place / "docs.jsonl").read_text().splitlines()]
    assert found.text is not None and found.by == "document"
    for unit, text in enumerate(texts):
        ids = loaded[2].encode(text)
        nats = hits = 0.0
        for start in range(1, len(ids), CONTEXT):
            window = ids[start - 1 : start + CONTEXT]
            p = log_p(window[:-1])
            nats -= sum(p[i, target] for i, target in enumerate(window[1:]))
            hits += sum(p[i].argmax() == target for i, target in enumerate(window[1:]))
        assert found.text.nats[unit] == pytest.approx(nats, rel=1e-5)
        assert found.text.hits[unit] == hits and found.text.tokens[unit] == len(ids) - 1
        # The first word has nothing before it, and its bytes do not count.
        assert found.text.bytes[unit] == len(text) - len(text.split()[0])
    data = found.to_dict()
    bits = found.text.nats.sum() / math.log(2) / found.text.bytes.sum()
    assert data["bits_per_byte"]["value"] == pytest.approx(bits)
    low, high = data["bits_per_byte"]["interval"]
    assert low < bits < high and data["units"] == {"kind": "document", "count": 24}
    assert data["accuracy"]["value"] == found.text.hits.sum() / found.text.tokens.sum()


def byte_tokenizer(begin: bool) -> ml.Tokenizer:
    """A tokenizer whose tokens are bytes; perhaps with one that begins texts."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {sign: i for i, sign in enumerate([*alphabet, "<s>"])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    if begin:
        backend.add_special_tokens(["<s>"])
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
        )
    return ml.Tokenizer(backend, {}, (), {}, Path("bytes"))


@pytest.mark.parametrize("begin", [False, True])
def test_bytes_are_those_of_the_counted_tokens(begin: bool) -> None:
    text = "🙂é naïve 🙂 text, " * 30
    held = read_held_out([text, "€uro"])
    assert held.by == "passage" and len(held.cuts[0]) > 3 and held.bytes == len((text + "€uro").encode())
    tokens, size = np.zeros(held.units), np.zeros(held.units)
    windows = list(held_out_text._windows(byte_tokenizer(begin), held, 16, tokens, size))
    counted = held.bytes - (0 if begin else 2)  # one byte of each document has nothing before it
    assert tokens.sum() == counted and size.sum() == pytest.approx(counted)
    assert sum(len(w.units) for w in windows) == counted and all(len(w.ids) <= 17 for w in windows)
    units = np.concatenate([w.units for w in windows])
    np.testing.assert_array_equal(np.bincount(units, minlength=held.units), tokens)
    if begin:
        assert {int(w.ids[0]) for w in windows} == {256}
    seen = b"".join(bytes(w.ids[w.first :].astype(np.uint8)) for w in windows)
    assert len(seen) == counted


def test_choices_are_scored_by_their_tokens(place: Path, loaded: Loaded, log_p: Any) -> None:
    tasks = read_tasks(place / "tasks.jsonl")
    found = ml.evaluate_model(*loaded, tasks=place / "tasks.jsonl")
    assert found.tasks is not None
    for task, scores, right in zip(tasks, found.tasks.log_likelihoods, found.tasks.right, strict=True):
        for choice, score in zip(task.choices, scores, strict=True):
            ids = loaded[2].encode(f"{task.question} {choice}")
            first = len(ids) - len(choice.split())
            p = log_p(ids[:-1])
            assert score == pytest.approx(sum(p[i - 1, ids[i]] for i in range(first, len(ids))), rel=1e-5)
        assert right == (np.argmax(scores) == task.answer)
    per_byte = [
        np.argmax([s / len(c) for s, c in zip(scores, task.choices, strict=True)]) == task.answer
        for task, scores in zip(tasks, found.tasks.log_likelihoods, strict=True)
    ]
    np.testing.assert_array_equal(found.tasks.right_per_byte, per_byte)
    data = found.to_dict()["tasks"]
    assert data["accuracy"]["value"] == np.mean(found.tasks.right) and data["chance"] == 0.5
    best = [int(np.argmax(scores)) for scores in found.tasks.log_likelihoods]
    planted = [
        {"question": t.question, "choices": list(t.choices), "answer": b}
        for t, b in zip(tasks, best, strict=True)
    ]
    again = ml.evaluate_model(*loaded, tasks=planted).to_dict()["tasks"]
    assert again["accuracy"] == {"value": 1.0, "interval": [1.0, 1.0]}


def test_answers_are_measured(loaded: Loaded) -> None:
    prompts = ["w5 w6", "w7", "w8 w9 w10"]
    found = score_answers(*loaded, prompts, max_new_tokens=6, batch=2, chat=False)
    texts = [text.split() for text in found.texts]
    assert found.new_tokens.tolist() == [len(words) for words in texts]
    assert found.ended.tolist() == [float(words[-1] == "w2") for words in texts]
    word = texts[0][1]
    again = score_answers(*loaded, prompts, max_new_tokens=6, batch=2, chat=False, think_end=word)
    assert again.thinking_closed.tolist() == [float(word in text) for text in again.texts]
    assert not found.thinking_closed.any() and again.thinking_closed[0] == 1


def test_a_recipe_and_adapters_are_models(here: Path, tmp_path: Path) -> None:
    ml.merge("r.yaml", tmp_path / "merged")
    text = here / "docs.jsonl"
    found = ml.compare_models(
        ["r.yaml", tmp_path / "merged", "one", "lora", "one+lora"],
        adapters=["lora"],
        text=text,
        context=CONTEXT,
    )
    # The adapter of `adapters` is added to the first model, the merge.
    recipe, _, one, alone, added, on_merge = found.evaluations
    nats = [each.text.nats for each in found.evaluations if each.text is not None]
    np.testing.assert_array_equal(nats[0], nats[1])
    np.testing.assert_array_equal(nats[3], nats[4])
    assert len({float(n.sum()) for n in nats}) == 4
    assert (recipe.name, alone.name, added.name, on_merge.name) == (
        "r.yaml",
        "lora",
        "one+lora",
        "r.yaml+lora",
    )
    same = found.to_dict()["differences"][0]
    assert same["models"] == ["r.yaml", str(tmp_path / "merged")]
    assert same["bits_per_byte"] == {"value": 0.0, "interval": [0.0, 0.0], "p": 1.0}
    assert found.to_dict()["models"][2]["model"] == one.name == "one"
    a, b = ml.load_model("r.yaml")[1], ml.load_model(tmp_path / "merged")[1]
    assert all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b)))
    assert ml.load_tokenizer("r.yaml").encode("w7") == [7] == ml.load_tokenizer("lora").encode("w7")


def test_what_a_plan_warns_of_is_told(here: Path, tmp_path: Path) -> None:
    shutil.copytree("other", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-6}))
    (tmp_path / "r.yaml").write_text((here / "r.yaml").read_text().replace("model: other", "model: ./other"))
    (tmp_path / "one").symlink_to(here / "one")
    os.chdir(tmp_path)
    notes: list[str] = []
    ml.compare_models(["r.yaml"], tasks=here / "tasks.jsonl", note=notes.append)
    assert any(note.startswith("r.yaml: rms_norm_eps is 1e-06 in model './other'") for note in notes)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli, ["evaluate", *arguments])


def test_the_command_prints_figures_and_differences(here: Path) -> None:
    options = ["--text", "t.txt", "--tasks", "tasks.jsonl", "--context", str(CONTEXT)]
    done = run("one", "other", *options, "--json")
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    for model in data["models"]:
        for figure in (model["bits_per_byte"], model["accuracy"], model["tasks"]["accuracy"]):
            low, high = figure["interval"]
            assert low <= figure["value"] <= high
        assert model["units"]["kind"] == "passage"
    (pair,) = data["differences"]
    one, other = (model["bits_per_byte"]["value"] for model in data["models"])
    assert (
        pair["bits_per_byte"]["value"] == pytest.approx(other - one) and 0 < pair["bits_per_byte"]["p"] <= 1
    )
    table = run("one", "other", *options).stdout
    assert "other - one" in table and f"{one:.4f}" in table


def test_all_faults_are_said_before_anything_is_computed(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a weight was loaded")

    monkeypatch.setattr(evaluation, "load_model", never)
    (tmp_path / "empty.txt").write_text(" \n")
    good = {"question": "w3", "choices": ["w4", "w5"]}
    lines = [
        {**good, "answer": 0},
        good,
        {**good, "answer": 2},
        {**good, "choices": ["w4"], "answer": 0},
        [1],
    ]
    (tmp_path / "tasks.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "bad.yaml").write_text(
        "merge_method: linear\nmodels: [{model: nobody}]\nparameters: {weight: 1}\n"
    )
    arguments = ["one", "nothing", str(tmp_path / "bad.yaml"), "--text", str(tmp_path / "empty.txt")]
    done = run(*arguments, "--tasks", str(tmp_path / "tasks.jsonl"))
    assert done.exit_code == 2
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    expected = [
        "empty.txt: there is no text in it",
        "line 2 has no 'answer'",
        "line 3: the answer is 2, none of 2 choices",
        "line 4: the choices are ['w4']; expected two texts or more",
        "line 5 is not a JSON object",
        "nothing does not exist",
        "'nobody' does not exist",
    ]
    assert len(said) == len(expected)
    assert all(words in line for words, line in zip(expected, said, strict=True)), said
    assert "text" in run("one").stderr
    missing = run("one", "--text", "missing.txt", "--text", "gone.txt").stderr
    assert "missing.txt cannot be read: it does not exist" in missing and "gone.txt cannot" in missing


@pytest.mark.parametrize(
    ("answer", "choices", "index"),
    [
        (1, ["a", "b"], 1),
        ("B", ["x", "y"], 1),
        ("y", ["x", "y"], 1),
        ("1", ["x", "y"], 1),
        ("2", {"text": ["x", "y"], "label": ["1", "2"]}, 1),
        ("B", {"text": ["x", "y"], "label": ["A", "B"]}, 1),
        (True, ["x", "y"], None),
        (-1, ["x", "y"], None),
        ("C", ["x", "y"], None),
    ],
)
def test_answers_are_indices_letters_labels_and_texts(answer: Any, choices: Any, index: int | None) -> None:
    record = {"prompt": "w3", "choices": choices, "answerKey": answer}
    if index is None:
        with pytest.raises(ml.errors.EvaluationError, match="none of 2 choices"):
            ml.verdict.choice_tasks.check_tasks([record])
    else:
        assert ml.verdict.choice_tasks.check_tasks([record])[0].answer == index


def test_models_that_stay_in_their_files_score_alike(place: Path, tmp_path: Path) -> None:
    arguments = ["evaluate", str(place / "one"), str(place / "r.yaml"), "--text", str(place / "docs.jsonl")]
    arguments += ["--tasks", str(place / "tasks.jsonl"), "--json"]
    told = []
    for more in ([], ["--stream-layers"], ["--stream-layers", "--spill", str(tmp_path)]):
        result = CliRunner().invoke(cli, [*arguments, *more])
        assert result.exit_code == 0, result.output
        told.append(json.loads(result.stdout))
    for other in told[1:]:
        for one, two in zip(told[0]["models"], other["models"], strict=True):
            assert one["bits_per_byte"]["value"] == pytest.approx(two["bits_per_byte"]["value"], rel=1e-5)
            assert one["accuracy"] == two["accuracy"] and one["tasks"] == two["tasks"]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("w3 w4")
    refused = CliRunner().invoke(cli, [*arguments[:2], "--prompts", str(prompts), "--stream-layers"])
    assert refused.exit_code == 2 and "answered by loaded models alone" in refused.output
