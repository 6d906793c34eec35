"""Scores that are known are not measured again; a torn file loses its last line, a foreign one is refused."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergelab.activations.model_activations import ModelActivations
from mergelab.errors import OutputError
from mergelab.sae.evaluation.metric import Evidence, Metric, Options, Score
from mergelab.sae.evaluation.scorecard import (
    METRICS,
    EvaluationJournal,
    Scorecard,
    control_scorecard,
    evaluation_key,
    scorecard,
)
from mergelab.sae.sae import SAE
from tests.sae.evaluation.trained_model import SubjectModel

CARD = Scorecard({"a.x": Score(0.1, "nats", "0 best"), "a.y": Score(float("nan"), "", "1 best")}, {"a": 2.5})


def test_what_is_written_is_read_to_the_bit(tmp_path: Path) -> None:
    file = tmp_path / "new" / "scores.jsonl"
    EvaluationJournal(file, "one")["a"] = CARD
    EvaluationJournal(file, "two")["a"] = Scorecard({})
    known = EvaluationJournal(file, "one")
    assert list(known) == ["a"] and known["a"].seconds == {"a": 2.5}
    assert known["a"].scores["a.x"] == CARD.scores["a.x"] and np.isnan(known["a"].scores["a.y"].value)
    assert json.loads(file.read_text().splitlines()[0])["scores"]["a.y"]["value"] == "nan"
    assert not EvaluationJournal(file, "three")


def test_a_torn_line_is_cut_off_and_a_foreign_file_refused(tmp_path: Path) -> None:
    file = tmp_path / "scores.jsonl"
    for metric in ("a", "b"):
        EvaluationJournal(file, "one")[metric] = CARD
    file.write_bytes(file.read_bytes()[:-9])
    torn = EvaluationJournal(file, "one")
    assert list(torn) == ["a"]
    torn["b"] = CARD
    assert list(EvaluationJournal(file, "one")) == ["a", "b"]
    (tmp_path / "notes.txt").write_text("mine\n")
    with pytest.raises(OutputError, match=r"notes\.txt, line 1"):
        EvaluationJournal(tmp_path / "notes.txt", "one")
    (tmp_path / "one_line.txt").write_text("notes without a last newline")
    with pytest.raises(OutputError, match="its last line is not a line"):
        EvaluationJournal(tmp_path / "one_line.txt", "one")
    assert (tmp_path / "one_line.txt").read_text() == "notes without a last newline"


def test_an_evaluation_goes_on_where_it_was_stopped(
    subject: SubjectModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["reconstruction", "downstream", "progressive"]
    options = Options(metrics=asked)
    whole = scorecard(subject.sae, subject.source, options)
    key = evaluation_key(subject.sae, subject.source, options, "weights")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setitem(METRICS, "progressive", Metric("progressive", "", {}, stop))  # type: ignore[arg-type]
        scorecard(subject.sae, subject.source, options, memory=EvaluationJournal(tmp_path / "kept", key))
    with monkeypatch.context() as patched:
        for name in asked[:2]:
            patched.setitem(METRICS, name, Metric(name, "", {}, stop))  # type: ignore[arg-type]
        memory = EvaluationJournal(tmp_path / "kept", key)
        found = scorecard(subject.sae, subject.source, options, memory=memory)
    assert found.values() == whole.values() and list(found.scores) == list(whole.scores)


def test_a_control_that_is_known_is_not_made_again(
    subject: SubjectModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory: dict[str, Scorecard] = {}
    options = Options(metrics=["reconstruction"])
    first = control_scorecard("random", subject.sae, subject.source, options, k=4, memory=memory)
    monkeypatch.delattr(sys.modules["mergelab.sae.evaluation.scorecard"], "control_sae")
    again = control_scorecard("random", subject.sae, subject.source, options, k=4, memory=memory)
    assert again.values() == first.values()


def test_keys_tell_what_scores_depend_on(subject: SubjectModel) -> None:
    def key(
        sae: SAE = subject.sae, source: ModelActivations = subject.source, weights: str = "1", **more: Any
    ) -> str:
        return evaluation_key(sae, Evidence(source, more), options, weights)

    options = Options()
    named = replace(subject.sae, config=replace(subject.sae.config, metadata={"name": "x"}))
    assert key(named) == key() and key(mask_token=3) == key()
    others = {
        key(weights="2"),
        key(source=replace(subject.source, tokens=subject.source.tokens[:9])),
        key(labels={"is_code": subject.source.tokens > 9}),
        key(replace(subject.sae, b_enc=subject.sae.b_enc + 1)),
        key(replace(subject.sae, config=replace(named.config, k=3))),
        key(curve=([1], [2.0])),
        key(of_a_new_kind=1),
    }
    first = key()
    options = Options(metrics=["reconstruction"])
    assert key() == first
    options = Options(samples=7)
    assert len({*others, first, key()}) == 9
