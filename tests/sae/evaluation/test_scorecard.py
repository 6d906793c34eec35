"""A scorecard holds what its parts find, tells trained from random, and says what it cannot measure."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mergelab.activations.model_activations import halves
from mergelab.errors import SAEError
from mergelab.sae.evaluation.controls import control_sae, random_model
from mergelab.sae.evaluation.metric import Evidence, Options
from mergelab.sae.evaluation.probing_tasks import label_texts
from mergelab.sae.evaluation.reconstruction import densities, reconstruction_on_model
from mergelab.sae.evaluation.scorecard import METRICS, Scorecard, control_scorecard, scorecard, seed_spread
from mergelab.sae.sae import SAE
from mergelab.sae.spliced_losses import evaluate_downstream
from tests.sae.evaluation.trained_model import LENGTH, SubjectModel


@pytest.fixture(scope="module")
def card(subject: SubjectModel) -> Scorecard:
    labels = label_texts(subject.folder, [subject.held_out], LENGTH).labels
    steps, losses = (np.array(part) for part in zip(*subject.curve, strict=True))
    evidence = Evidence(subject.source, {"labels": labels, "curve": (steps, losses)})
    return scorecard(subject.sae, evidence, Options(samples=32, explained=6))


def test_every_metric_is_there_with_its_unit(card: Scorecard) -> None:
    default = {name for name, metric in METRICS.items() if metric.default}
    assert (
        {name.split(".")[0] for name in card.scores}
        == set(card.seconds)
        == default - {"embeddings", "labels"}
    )
    for name, score in card.scores.items():
        assert score.against and (np.isfinite(score.value) or name == "downstream.compute_equivalent"), name
    values = card.values()
    assert (
        values["probing.relative_loss"] < 0.9 and 0 < values["probing.f1_1"] <= values["probing.f1_5"] + 0.1
    )
    assert values["progressive.nmse_k1"] > values["progressive.nmse_k2"] > values["reconstruction.nmse"]
    assert 0 <= values["absorption.rate"] < 1 <= values["absorption.split"]


def test_scores_are_those_of_the_second_half(subject: SubjectModel, card: Scorecard) -> None:
    fit, judge = halves(subject.source)
    assert len(fit.tokens) + len(judge.tokens) == len(subject.source.tokens)
    found = reconstruction_on_model(subject.sae, judge)
    assert card.values()["reconstruction.nmse"] == found.nmse
    assert densities(found.densities).counts.sum() == round(found.alive * 96)
    assert card.values()["downstream.delta_ce"] == evaluate_downstream(subject.sae, judge).delta_ce
    assert found.nmse != reconstruction_on_model(subject.sae, fit).nmse


@pytest.fixture(scope="module")
def controls(subject: SubjectModel) -> dict[str, SAE]:
    fit, _ = halves(subject.source)
    kinds = ("random", "frozen decoder")
    return {kind: control_sae(kind, fit, n_latents=96, k=4, steps=60) for kind in kinds}


def test_controls_are_worse(subject: SubjectModel, card: Scorecard, controls: dict[str, SAE]) -> None:
    mine, errors = card.values(), {}
    for kind, control in controls.items():
        found = scorecard(control, subject.source, Options(metrics=["reconstruction", "downstream"])).values()
        errors[kind] = found["reconstruction.nmse"]
        assert found["downstream.delta_ce"] > 1.2 * mine["downstream.delta_ce"]
        assert found["downstream.recovered_zero"] < mine["downstream.recovered_zero"]
    assert errors["random"] > 1.1 * errors["frozen decoder"] > 1.3 * mine["reconstruction.nmse"]
    again = control_scorecard("random", subject.sae, subject.source, Options(metrics=["reconstruction"]), k=4)
    assert again.values()["reconstruction.nmse"] == pytest.approx(errors["random"], rel=1e-6)


def test_controls_are_what_they_are_called(subject: SubjectModel, controls: dict[str, SAE]) -> None:
    random, frozen = controls["random"], controls["frozen decoder"]
    np.testing.assert_allclose(np.asarray(frozen.W_dec), np.asarray(random.W_dec), atol=1e-6)
    assert np.abs(np.asarray(frozen.W_enc) - np.asarray(random.W_enc)).max() > 1e-3
    other = random_model(subject.source, 1)
    assert np.abs(other.read_sites(0, 32)[0] - subject.source.read_sites(0, 32)[0]).max() > 0.01
    with pytest.raises(SAEError, match="did you mean 'random'"):
        control_sae("randm", subject.source, n_latents=64, k=4)


def test_spread_over_seeds(card: Scorecard) -> None:
    shifted = {name: replace(score, value=score.value + 2) for name, score in card.scores.items()}
    spread = seed_spread([card, Scorecard(shifted)])
    mean, deviation = spread["reconstruction.nmse"]
    assert mean == pytest.approx(card.values()["reconstruction.nmse"] + 1)
    assert deviation == pytest.approx(np.sqrt(2))
    with pytest.raises(SAEError, match="two or more"):
        seed_spread([card])


def test_what_cannot_be_measured_is_said(subject: SubjectModel) -> None:
    with pytest.raises(SAEError, match="did you mean 'downstream'"):
        scorecard(subject.sae, subject.source, Options(metrics=["downstrem"]))
    with pytest.raises(SAEError, match="labels of tokens"):
        scorecard(subject.sae, subject.source, Options(metrics=["probing"]))
    with pytest.raises(SAEError, match="an encoder's embeddings"):
        scorecard(subject.sae, subject.source, Options(metrics=["embeddings"]))
    found = scorecard(subject.sae, subject.source, Options(metrics=["probing", "reconstruction"]))
    assert "labels of tokens" in found.scores["probing"].against and np.isnan(found.values()["probing"])
    assert found.values()["reconstruction.nmse"] > 0  # what is asked for beside it is measured
    one = replace(subject.source, tokens=subject.source.tokens[:1])
    with pytest.raises(SAEError, match="one context"):
        scorecard(subject.sae, one, Options(metrics=["reconstruction"]))
