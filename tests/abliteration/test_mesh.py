"""Directions and scores of a model that is spread over devices are those of one device."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.abliteration.ablation import Ablation
from mergelab.abliteration.behavior import first_token_scores
from mergelab.abliteration.directions import Directions, mean_activations
from mergelab.abliteration.removal import ablate, induce
from mergelab.models.load import load_model
from mergelab.models.save import save_model
from mergelab.sharding import make_mesh
from tests.abliteration.planted import POSITIONS, REFUSE, Planted, prompt_set


@pytest.mark.slow
def test_a_mesh_changes_nothing(planted: Planted, directions: Directions, tmp_path: Path) -> None:
    save_model(planted.model, planted.params, tmp_path / "model")
    model, params = load_model(
        tmp_path / "model", mesh=make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    )
    harmful = prompt_set(128, 1, True)
    means = mean_activations(model, params, harmful, positions=POSITIONS, batch=64)
    np.testing.assert_allclose(means, directions.harmful, atol=1e-4)
    ablation = Ablation.everywhere(jnp.asarray(directions.unit[1, 2]), 4)
    ids = np.array([REFUSE], np.int32)
    few = prompt_set(64, 3, True)
    spread, one = (
        first_token_scores(
            model, p, few, ids, edit=ablate(model, p, ablation) | induce(jnp.zeros((4, 64))), batch=64
        )
        for p in (params, planted.params)
    )
    np.testing.assert_allclose(spread[0], one[0], atol=1e-3)
    np.testing.assert_allclose(spread[2], one[2], atol=1e-3)
