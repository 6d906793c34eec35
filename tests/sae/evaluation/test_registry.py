"""An evaluation is one file with its metric; scorecard, help, JSON and docs read the registry."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import pytest
from click.testing import CliRunner

from mergelab.cli.main import cli
from mergelab.errors import SAEError
from mergelab.sae.evaluation.metric import Evidence, Metric, Options, Scores
from mergelab.sae.evaluation.scorecard import METRICS, control_scorecard, scorecard
from mergelab.sae.sae import SAE
from mergelab.sae.splice import read_batches
from tests.sae.evaluation.trained_model import LENGTH, SubjectModel


def _scores(sae: SAE, evidence: Evidence, options: Options) -> Scores:
    most = max(float(sae.encode(jnp.asarray(x)).max()) for x in read_batches(evidence.judge))
    yield "largest", most, "largest activation of any latent"
    yield "bound", evidence.get("bound", float("nan")), "what was given"


METRIC = Metric("dummy", "largest activations", {"largest": "units of x", "b*": ""}, _scores, default=False)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Metric:
    monkeypatch.setitem(METRICS, METRIC.name, METRIC)
    return METRIC


def test_a_new_evaluation_is_in_scorecard_help_and_json(registered: Metric, subject: SubjectModel) -> None:
    card = scorecard(subject.sae, Evidence(subject.source, {"bound": 7.5}), Options(metrics=["dummy"]))
    assert list(card.scores) == ["dummy.largest", "dummy.bound"] and card.values()["dummy.bound"] == 7.5
    assert card.scores["dummy.largest"].unit == "units of x"
    said = " ".join(CliRunner().invoke(cli, ["sae", "eval", "--help"]).output.split())
    assert all(name in said for name in METRICS) and "dummy*" in said and registered.about in said
    asked = [
        "sae",
        "eval",
        subject.folder.parent / "sae",
        "--model",
        subject.folder,
        "--text",
        subject.held_out,
    ]
    more = ["--context", LENGTH, "--metrics", "dummy", "--json"]
    found = CliRunner().invoke(cli, [str(part) for part in (*asked, *more)], catch_exceptions=False)
    (scores,) = json.loads(found.output.splitlines()[-1])["dictionaries"].values()
    assert scores["dummy.largest"] == vars(card.scores["dummy.largest"])
    assert scores["dummy.bound"]["value"] is None


def test_new_evidence_reaches_an_evaluation_and_its_control(
    subject: SubjectModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METRICS, "dummy", replace(METRIC, needs=("bound",)))
    options = Options(metrics=["dummy"])
    with pytest.raises(SAEError, match="the metric 'dummy' needs bound"):
        scorecard(subject.sae, subject.source, options)
    evidence = Evidence(subject.source, {"bound": 2.0})
    assert control_scorecard("random", subject.sae, evidence, options, k=4).values()["dummy.bound"] == 2.0
    monkeypatch.setitem(METRICS, "dummy", replace(METRIC, units={"largest": ""}))
    with pytest.raises(SAEError, match="'bound' whose unit"):
        scorecard(subject.sae, subject.source, options)


def test_the_gap_between_encoder_and_searched_codes_is_an_evaluation(subject: SubjectModel) -> None:
    found = scorecard(subject.sae, subject.source, Options(metrics=["amortization_gap"])).values()
    assert found["amortization_gap.searched_error"] < found["amortization_gap.encoder_error"] < 1
    assert found["amortization_gap.encoder_l0"] == pytest.approx(4, abs=0.5)
    assert 0 < found["amortization_gap.overlap"] < 1
    assert not METRICS["amortization_gap"].default


def _documented() -> dict[str, str]:
    """Score -> unit, from the table of the page."""
    page = Path(__file__).resolve().parents[3] / "docs" / "sae_evaluation.md"
    found: dict[str, str] = {}
    metric = ""
    for row in page.read_text(encoding="utf-8").split("| score |")[1].splitlines():
        cells = re.split(r"(?<!\\)\|", row)
        for name in re.findall(r"`([a-z_]*\.[a-z0-9_*]+)`", cells[1] if len(cells) > 3 else ""):
            metric = name.split(".")[0] or metric
            found[f"{metric}.{name.split('.')[1]}"] = cells[3].strip()
    return found


def test_the_documented_table_is_the_registry() -> None:
    declared = {f"{m.name}.{part}": unit for m in METRICS.values() for part, unit in m.units.items()}
    assert _documented() == declared
