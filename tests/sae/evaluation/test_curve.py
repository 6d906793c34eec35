"""The curve of a training is its checkpoints' losses on the very text that judges."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from mergelab.errors import SAEError
from mergelab.quickstart import small_llama
from mergelab.sae.evaluation.training_curve import LossCurve, compute_equivalent, loss_curve, open_loss_curve
from mergelab.sae.spliced_losses import evaluate_downstream
from mergelab.sharding import make_mesh
from tests.sae.evaluation.trained_model import SubjectModel


@pytest.fixture(scope="module")
def checkpoints(subject: SubjectModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The subject at its end, and a quarter of the way to it from random weights."""
    folder = tmp_path_factory.mktemp("checkpoints")
    _, end = small_llama.load(subject.folder)
    early = jax.tree.map(lambda a, b: 0.25 * a + 0.75 * b, end, small_llama.init(subject.config, 0))
    for step, params in ((150, end), (9, early)):
        small_llama.save(params, subject.config, folder / str(step))
    (folder / "notes").mkdir()
    return folder


def test_losses_are_those_of_an_evaluation(subject: SubjectModel, checkpoints: Path) -> None:
    steps, losses = loss_curve(checkpoints, subject.source)
    found = evaluate_downstream(subject.sae, subject.source)
    assert steps.tolist() == [9, 150] and losses[0] > losses[1] + 0.5
    assert losses[1] == pytest.approx(found.ce, rel=1e-5)
    assert 9 / 150 < compute_equivalent(steps, losses, found.ce_spliced) < 1
    part = loss_curve(checkpoints, replace(subject.source, tokens=subject.source.tokens[:5]))[1]
    assert abs(part - losses).max() > 1e-3
    mesh = make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    np.testing.assert_allclose(loss_curve(checkpoints, subject.source, mesh=mesh)[1], losses, rtol=1e-5)


def test_what_is_no_curve_is_said(subject: SubjectModel, checkpoints: Path, tmp_path: Path) -> None:
    (tmp_path / "10").mkdir()
    with pytest.raises(SAEError, match="1 folders named by a training step"):
        loss_curve(tmp_path, subject.source)
    small = replace(subject.config, intermediate_size=16)
    params = small_llama.init(small, 0)
    for step in (20, 30):
        small_llama.save(params, small, tmp_path / "other" / str(step))
    with pytest.raises(SAEError, match="another shape"):
        loss_curve(tmp_path / "other", subject.source)


def measured(truth: Mapping[int, float], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps whose checkpoints were run, of a curve that is known."""
    asked: list[int] = []

    def measure(curve: LossCurve, path: Path) -> float:
        asked.append(int(path.name))
        return truth[int(path.name)]

    monkeypatch.setattr(LossCurve, "_measure", measure)
    return asked


@pytest.mark.parametrize("loss", [9.0, 4.2, 3.1, 2.5, 2.01, 1.0])
def test_few_of_many_checkpoints_place_a_loss(
    subject: SubjectModel, monkeypatch: pytest.MonkeyPatch, loss: float
) -> None:
    truth = {step: 2 + 8 / step**0.5 for step in range(4, 4004, 8)}
    asked = measured(truth, monkeypatch)
    curve = LossCurve({step: Path(str(step)) for step in truth}, subject.source)
    whole = np.array(list(truth), np.float64), np.array(list(truth.values()))
    np.testing.assert_equal(compute_equivalent(*curve.around(loss), loss), compute_equivalent(*whole, loss))
    assert len(asked) <= 17 < len(truth)
    assert len(set(asked)) == len(asked)
    before = len(asked)
    curve.around(loss)
    assert len(asked) == before  # what is known is not measured again


def test_a_curve_that_rises_is_measured_whole(subject: SubjectModel, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = {step: 10 - step / 100 for step in range(1, 401)}
    curve = LossCurve({step: Path(str(step)) for step in truth}, subject.source)
    asked = measured(truth, monkeypatch)
    curve.around(100.0)
    assert len(asked) < 10
    truth[asked[4]] += 5
    measured(truth, monkeypatch)
    again = LossCurve(curve.folders, subject.source)
    assert again.around(8.0)[0].tolist() == list(truth)


def test_checkpoints_are_told_apart_without_reading_them(subject: SubjectModel, checkpoints: Path) -> None:
    curve = open_loss_curve(checkpoints, subject.source)
    before = curve.identity()
    assert before == open_loss_curve(checkpoints, subject.source).identity()
    os.utime(checkpoints / "9" / "model.safetensors", ns=(1, 1))
    assert curve.identity() != before
