"""Figures of latents, on an SAE whose rows are known."""

from __future__ import annotations

import csv

import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.activations import ModelActivations
from mergelab.models import model_from_config
from mergelab.sae import SAE, SAEConfig
from mergelab.sae.features import latent_figures, latents_csv, survey
from mergelab.sae.features.figures_of_latents import _nearest

ROWS = np.array([[2, 0, 0, 0], [3, 4, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0, -1, 0]], np.float32)


@pytest.fixture(scope="module")
def sae() -> SAE:
    encoder = np.stack([ROWS[0], ROWS[0], ROWS[2] * 2, ROWS[2], ROWS[2]])
    arrays = (jnp.asarray(encoder.T), jnp.arange(5.0), jnp.asarray(ROWS), jnp.zeros(4))
    return SAE(*arrays, config=SAEConfig("relu")).checked()


def test_norms_and_cosines_are_those_of_the_rows(sae: SAE) -> None:
    found = latent_figures(sae)
    np.testing.assert_allclose(found["decoder_norm"], [2, 5, 1, 0, 1])
    np.testing.assert_allclose(found["encoder_norm"], [2, 2, 2, 1, 1])
    np.testing.assert_allclose(found["encoder_bias"], np.arange(5))
    np.testing.assert_allclose(found["encoder_decoder_cosine"], [1, 0.6, 1, 0, -1], rtol=1e-6)
    np.testing.assert_allclose(found["decoder_cosine"], [0.6, 0.6, 0, 0, 0], rtol=1e-6)
    assert found["nearest"][:2].tolist() == [1, 0] and "density" not in found


@pytest.mark.parametrize("numbers", [1, 70, 2**25])
def test_blocks_find_what_all_rows_at_once_do(monkeypatch: pytest.MonkeyPatch, numbers: int) -> None:
    monkeypatch.setattr("mergelab.sae.features.figures_of_latents._BLOCK_NUMBERS", numbers)
    rows = np.random.default_rng(0).normal(size=(33, 8)).astype(np.float32)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    alike = unit @ unit.T - 9 * np.eye(33)
    cosine, nearest = _nearest(rows)
    np.testing.assert_array_equal(nearest, alike.argmax(axis=1))
    np.testing.assert_allclose(cosine, alike.max(axis=1), rtol=1e-5)


def test_densities_are_those_of_a_survey(sae: SAE) -> None:
    config = {
        "model_type": "llama", "vocab_size": 20, "hidden_size": 4, "intermediate_size": 4,
        "num_hidden_layers": 1, "num_attention_heads": 1,
    }  # fmt: skip
    model = model_from_config(config)
    tokens = np.random.default_rng(0).integers(0, 20, (6, 8)).astype(np.int32)
    source = ModelActivations(model, model.init(0), tokens, ("blocks.0.resid_post",), batch=4)
    found, wanted = latent_figures(sae, source), survey(sae, source)
    np.testing.assert_allclose(found["density"], wanted.density)
    assert 0 < found["density"].max() <= 1 and wanted.rows == 42
    table = list(csv.DictReader(latents_csv(sae, source).splitlines()))
    assert [int(row["latent"]) for row in table] == list(range(5)) and list(table[0]) == list(found)
    np.testing.assert_allclose([float(row["density"]) for row in table], found["density"], rtol=1e-5)
