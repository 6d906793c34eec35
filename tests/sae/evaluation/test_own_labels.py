"""Labels of one's own: forms of files, what they become in tokens, what is refused, what probes find."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mergelab.cli.main import cli
from mergelab.errors import MergelabError, SAEError
from mergelab.sae.evaluation.evaluate import evaluate_sae
from mergelab.sae.evaluation.label_files import labeled_texts, read_labeled_texts
from mergelab.sae.evaluation.metric import Evidence
from mergelab.sae.evaluation.own_labels import label_contexts, probe_labels
from mergelab.sae.evaluation.probing import sparse_probe
from mergelab.text.corpus import TextOptions
from mergelab.text.tokenizer import load_tokenizer
from tests.sae.evaluation.trained_model import LENGTH, SubjectModel

_WORDS = ["def", "return", "import", "class", "while", "string", "index", "value", "result", "lines"]


def _texts(rng: np.random.Generator, digits: bool, count: int) -> list[str]:
    """Short texts of words, each followed by a number or by a bracket."""
    made = []
    for _ in range(count):
        words = rng.choice(_WORDS, 6).tolist()
        made.append(" ".join(f"{word} {rng.integers(100, 999) if digits else '()'}" for word in words))
    return made


@pytest.fixture(scope="module")
def reviews() -> tuple[list[str], list[str]]:
    rng = np.random.default_rng(0)
    texts = _texts(rng, True, 24) + _texts(rng, False, 60)
    return texts, ["number"] * 24 + ["bracket"] * 60  # sorted by class, as files often are


def _write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_every_kind_of_file_holds_the_same(tmp_path: Path) -> None:
    records = [{"text": "a, b", "label": 1}, {"text": 'say "c"\nd', "label": 0}]
    lines = _write(tmp_path / "a.jsonl", records)
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "a.csv").write_text('text,label\n"a, b",1\n"say ""c""\nd",0\n')
    (tmp_path / "a.tsv").write_text('text\tlabel\na, b\t1\n"say ""c""\nd"\t0\n')
    wanted = [(one.text, one.label) for one in read_labeled_texts(lines)]
    assert wanted == [("a, b", "1"), ('say "c"\nd', "0")]
    for name in ("a.json", "a.csv", "a.tsv"):
        assert [(one.text, one.label) for one in read_labeled_texts(tmp_path / name)] == wanted
    named = _write(tmp_path / "b.jsonl", [{"sentence": "x y", "gold": True}])
    (found,) = read_labeled_texts(named, field="sentence", label_field="gold")
    assert (found.text, found.label) == ("x y", "true")


@pytest.mark.extra
def test_a_parquet_file_holds_the_same(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    records = [{"text": "a, b", "label": 1}, {"text": 'say "c"\nd', "label": 0}]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    found = read_labeled_texts(tmp_path / "a.parquet")
    assert [(one.text, one.label) for one in found] == [("a, b", "1"), ('say "c"\nd', "0")]


def test_spans_words_and_tokens_label_the_same_tokens(subject: SubjectModel) -> None:
    tokenizer = load_tokenizer(subject.folder)
    text = "def index return value"
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    spelt = [(text[s:e].strip(), s) for s, e in encoding.offsets]
    tokens = [
        None if not part else "name" if part in "index" and 3 <= s < 9 else "thing" if s >= 16 else None
        for part, s in spelt
    ]
    given = [[4, 9, "name"], {"start": 17, "end": 22, "label": "thing"}]
    options = TextOptions(bos=False)
    spans = label_contexts(tokenizer, labeled_texts([text], [given]), LENGTH, options)
    by_token = label_contexts(tokenizer, labeled_texts([text], [tokens]), LENGTH, options)
    count = len(encoding.ids)
    assert spans.classes == by_token.classes == ("name", "thing")
    np.testing.assert_array_equal(
        spans.codes[0, :count], [{"name": 0, "thing": 1, None: 2}[label] for label in tokens]
    )
    np.testing.assert_array_equal(
        by_token.codes[0, :count], [{"name": 0, "thing": 1, None: -1}[label] for label in tokens]
    )
    assert (spans.codes[0, count:] == -1).all() and (spans.texts[0, :count] == 0).all()


def test_words_of_a_list_are_labeled(subject: SubjectModel, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(subject.folder)
    file = _write(tmp_path / "ner.jsonl", [{"tokens": ["def", "index", "value"], "ner_tags": [0, 3, -100]}])
    given = read_labeled_texts(file, label_field="ner_tags")
    found = label_contexts(tokenizer, given, LENGTH, TextOptions(bos=False))
    text = tokenizer.backend.encode("def index value", add_special_tokens=False)
    solid = [s + ("def index value"[s] == " " and e - s > 1) for s, e in text.offsets]
    # What stands between words is of no class.
    wanted = [0 if s < 3 else 1 if 4 <= s < 9 else -1 if s >= 10 else 2 for s in solid]
    assert found.classes == ("0", "3")
    np.testing.assert_array_equal(found.codes[0, : len(wanted)], wanted)


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([{"text": "a", "label": "x"}, {"text": "b", "label": "x"}], "all 'x'; a probe tells one"),
        ([{"text": "a", "label": 0.5}, {"text": "b", "label": 1}], "record 1: label is 0.5; expected"),
        ([{"text": "a", "lable": "x"}], "no field 'label' .did you mean 'lable'"),
        ([{"txt": "a", "label": "x"}], "no field 'text' .did you mean 'txt'"),
        ([{"text": "a", "label": "x"}, {"text": "b", "labels": ["x"]}], "record 2 is labeled in its parts"),
        ([{"text": "def", "labels": ["x"] * 40}, {"text": "a", "labels": ["y"]}], "40 labels, but its text"),
        ([{"text": "abc", "labels": [[1, 9, "x"]]}], "not within its text of 3"),
        ([{"text": "a b", "tokens": ["a", "b"], "labels": ["x"]}], "1 labels, but 2 words"),
        ([{"text": "a", "label": n} for n in range(300)], "300 classes, such as '0' and '299'"),
        ([], "holds no text"),
    ],
    ids=[
        "one-class",
        "amount",
        "label-name",
        "text-name",
        "two-forms",
        "length",
        "span",
        "words",
        "many",
        "none",
    ],
)
def test_what_is_no_labeling_is_refused(
    subject: SubjectModel, tmp_path: Path, records: list[dict[str, Any]], words: str
) -> None:
    file = _write(tmp_path / "labels.jsonl", records)
    with pytest.raises(SAEError, match=words):
        label_contexts(load_tokenizer(subject.folder), read_labeled_texts(file), LENGTH)


def test_all_faults_of_a_file_are_named_at_once(tmp_path: Path) -> None:
    file = _write(tmp_path / "labels.jsonl", [{"text": "", "label": 1}, {"text": "a", "label": []}, 3])  # type: ignore[list-item]
    with pytest.raises(SAEError) as caught:
        read_labeled_texts(file)
    assert len(caught.value.faults) == 2
    with pytest.raises(MergelabError, match="does not exist"):
        read_labeled_texts(tmp_path / "none.csv")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(SAEError, match="JSON lines, JSON, CSV"):
        read_labeled_texts(tmp_path / "a.txt")
    with pytest.raises(SAEError, match="2 texts have 3 labels"):
        labeled_texts(["a", "b"], [1, 0, 1])


def test_texts_are_told_apart_and_shuffled_labels_are_not(
    subject: SubjectModel, reviews: tuple[list[str], list[str]]
) -> None:
    texts, labels = reviews
    tokenizer = load_tokenizer(subject.folder)
    labeled = label_contexts(tokenizer, labeled_texts(texts, labels), LENGTH, TextOptions(bos=False))
    assert labeled.tokens.shape[1] <= LENGTH and not labeled.by_token
    assert set(np.unique(labeled.texts)) - {-1} == set(range(84))
    found = probe_labels(subject.sae, subject.source, labeled)
    assert list(found) == ["number"]  # of two classes one question
    assert found["number"].examples == (24, 60) and found["number"].sparse[5].accuracy > 0.9
    assert found["number"].loss < 0.5 * found["number"].prior
    mixed = np.random.default_rng(3).permutation(np.array(labels)).tolist()
    chance = label_contexts(tokenizer, labeled_texts(texts, mixed), LENGTH, TextOptions(bos=False))
    assert probe_labels(subject.sae, subject.source, chance)["number"].sparse[1].accuracy < 0.75
    few = label_contexts(tokenizer, labeled_texts(texts[18:36], labels[18:36]), LENGTH)
    with pytest.raises(SAEError, match=r"too few labeled texts that count.*'number' 6"):
        probe_labels(subject.sae, subject.source, few)


def test_balanced_classes_weigh_the_same() -> None:
    rng = np.random.default_rng(0)
    labels = rng.random(4000) < 0.05
    codes = np.abs(rng.standard_normal((4000, 6))).astype(np.float32)
    codes[:, 2] += 1.5 * labels
    natural = sparse_probe(codes, labels, 1)
    balanced = sparse_probe(codes, labels, 1, balanced=True)
    assert natural.accuracy > 0.94 and natural.f1 < 0.5  # it says no nearly always
    assert 0.75 < balanced.accuracy < 0.95 and balanced.f1 > 0.75
    repeated = np.concatenate([np.repeat(np.flatnonzero(labels), 19), np.flatnonzero(~labels)])
    again = sparse_probe(codes[repeated], labels[repeated], 1)
    assert balanced.accuracy == pytest.approx(again.accuracy, abs=0.05)
    groups = np.arange(4000) // 40
    apart = sparse_probe(codes, labels, 1, balanced=True, groups=groups)
    assert apart.accuracy == pytest.approx(balanced.accuracy, abs=0.1)


def test_classes_against_the_rest_and_tokens(subject: SubjectModel, reviews: Any) -> None:
    texts, _ = reviews
    spans = [
        [(found.start(), found.end(), found.group()) for found in re.finditer("def|index", text)]
        for text in texts
    ]
    card = evaluate_sae(
        subject.sae,
        subject.source.model,
        subject.source.params,
        load_tokenizer(subject.folder),
        texts,
        labels=spans,
        length=LENGTH,
        metrics=["labels"],
        balance=False,
    )
    values, against = card.values(), card.scores["labels.accuracy_1"].against
    assert values["labels.relative_loss"] < 0.8
    assert values["labels.majority"] > 0.8
    assert "mean of 2" in against and "as frequent as they are" in against
    assert "'def'" in card.scores["labels.worst"].against or "'index'" in card.scores["labels.worst"].against


def test_answers_for_other_tokens_are_refused(subject: SubjectModel) -> None:
    shape = subject.source.tokens.shape
    with pytest.raises(SAEError, match=r"labels of 'a' have shape \[3, 2\], but the tokens"):
        Evidence(subject.source, {"labels": {"a": np.zeros((3, 2), bool)}})
    with pytest.raises(SAEError, match="labels of 'a' are float64; expected bool"):
        evaluate_sae(subject.sae, subject.source, labels={"a": np.zeros(shape)})
    with pytest.raises(SAEError, match="need the model's tokenizer"):
        evaluate_sae(subject.sae, subject.source, labels=labeled_texts(["a", "b"], [0, 1]))


@pytest.fixture
def asked(subject: SubjectModel, reviews: tuple[list[str], list[str]], tmp_path: Path) -> list[str]:
    """The command on a file of labeled texts."""
    records = [{"text": text, "kind": kind} for text, kind in zip(*reviews, strict=True)]
    file = _write(tmp_path / "reviews.jsonl", records)
    given = ["sae", "eval", subject.folder.parent / "sae", "--model", subject.folder, "--labels", file]
    return [str(part) for part in (*given, "--context", LENGTH, "--json", "--label-field")]


def _scores(asked: list[str], *more: str) -> dict[str, Any]:
    result = CliRunner().invoke(cli, [*asked, "kind", *more], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (scores,) = json.loads(result.output.splitlines()[-1])["dictionaries"].values()
    return scores


def test_the_command_probes_a_file_alone(asked: list[str]) -> None:
    alone = _scores(asked, "--metrics", "labels,reconstruction")
    assert alone["labels.accuracy_5"]["value"] > 0.9 and alone["reconstruction.nmse"]["value"] > 0
    assert "84 texts" in alone["labels.base_rate"]["against"]
    assert alone["labels.base_rate"]["value"] == pytest.approx(24 / 84)
    assert "balanced by weights" in alone["labels.accuracy_1"]["against"]
    wrong = CliRunner().invoke(cli, [*asked, "kin"])
    assert wrong.exit_code == 2 and "did you mean 'kind'" in " ".join(wrong.output.split())


@pytest.mark.slow
def test_beside_a_text_and_from_python_the_same_is_found(subject: SubjectModel, asked: list[str]) -> None:
    alone = _scores(asked, "--metrics", "labels")["labels.accuracy_5"]
    beside = _scores(asked, "--metrics", "labels", "--text", str(subject.held_out))
    assert beside["labels.accuracy_5"] == alone
    file = Path(asked[asked.index("--labels") + 1])
    given = read_labeled_texts(file, label_field="kind")
    found = evaluate_sae(subject.sae, subject.folder, labels=given, length=LENGTH, metrics=["labels"])
    assert found.values()["labels.accuracy_5"] == alone["value"]


def test_an_option_with_a_slip_of_the_pen_is_no_new_evidence(subject: SubjectModel) -> None:
    with pytest.raises(SAEError, match=r"'metric' is no option of an evaluation .did you mean 'metrics'"):
        evaluate_sae(subject.sae, subject.source, metric=["downstream"])
