"""The curve of a training is its checkpoints' losses on the very text that judges."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from mergelab.errors import SAEError
from mergelab.quickstart import small_llama
from mergelab.sae.evaluation.downstream import compute_equivalent, evaluate_downstream, loss_curve
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
