"""The saved direction reads as it was, steers and ablates, and says what is wrong with others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from mergelab.abliteration import Ablation, SavedDirection, load_direction, save_direction
from mergelab.errors import CheckpointError, MergelabError, OutputError
from mergelab.interp import SteeringVector, ablate, steer
from mergelab.interp.vectors import unit
from mergelab.models.families import model_from_config
from tests.abliteration.planted import CONFIG

WIDTH, LAYERS = 64, 4


@pytest.fixture
def saved() -> SavedDirection:
    rng = np.random.default_rng(3)
    rows = unit(jnp.asarray(rng.normal(size=(LAYERS + 1, WIDTH)), jnp.float32))
    shares = jnp.asarray(rng.random((2, LAYERS)), jnp.float32)
    vector = SteeringVector(rows[0], jnp.float32(2.5), "blocks.2.resid_pre", "llama")
    computed = {"model": "org/m", "prompts": {"harmful": 48, "harmless": 48}, "kind": "difference of means"}
    return SavedDirection(vector, Ablation(rows, jnp.float32(0.5), *shares), "written", computed)


def test_what_is_saved_is_read_to_the_bit(saved: SavedDirection, tmp_path: Path) -> None:
    path = save_direction(saved, tmp_path / "direction.safetensors")
    found = load_direction(path)
    assert found.vector.site == "blocks.2.resid_pre" and found.vector.model_type == "llama"
    assert float(found.vector.norm) == 2.5 and found.keep_norms == "written"
    assert found.computed_from == saved.computed_from
    assert found.ablation is not None and saved.ablation is not None
    for name in ("directions", "embeddings", "attention", "mlp"):
        np.testing.assert_array_equal(getattr(found.ablation, name), getattr(saved.ablation, name))
    np.testing.assert_allclose(found.vector.vector, saved.vector.vector, atol=1e-7)
    assert found.for_model(model_from_config(CONFIG)) is found.ablation
    with safe_open(path, "np") as file:  # as anybody's reader finds it
        assert set(file.keys()) == {"direction", "directions", "embeddings", "attention", "mlp"}
        assert json.loads(file.metadata()["computed_from"])["model"] == "org/m"
    with pytest.raises(OutputError, match="is there already"):
        save_direction(saved, path)
    assert save_direction(saved, path, overwrite=True) == path
    # In a model's folder it stands where no server takes it for weights.
    (tmp_path / "model" / "abliteration").mkdir(parents=True)
    path.rename(tmp_path / "model" / "abliteration" / "direction.safetensors")
    assert load_direction(tmp_path / "model").vector.site == "blocks.2.resid_pre"


def test_it_steers_and_ablates(saved: SavedDirection, tmp_path: Path) -> None:
    vector = load_direction(save_direction(saved, tmp_path / "d.safetensors")).vector
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, WIDTH)), jnp.float32)
    along = lambda y: np.asarray(jnp.einsum("...w,w->...", y, saved.vector.vector))  # noqa: E731
    np.testing.assert_allclose(along(steer(vector, 1.0)(x)) - along(x), 2.5, atol=1e-5)
    np.testing.assert_allclose(along(ablate(vector)(x)), 0.0, atol=1e-5)


def test_a_bare_direction_is_removed_everywhere(tmp_path: Path) -> None:
    vector = np.arange(WIDTH, dtype=np.float16)
    save_file({"direction": vector}, tmp_path / "bare.safetensors")
    found = load_direction(tmp_path / "bare.safetensors")
    ablation = found.for_model(model_from_config(CONFIG))
    expected = vector.astype(np.float64) / np.linalg.norm(vector.astype(np.float64))
    np.testing.assert_allclose(ablation.directions, np.tile(expected, (LAYERS + 1, 1)), atol=1e-6)
    assert np.all(np.asarray(ablation.mlp) == 1) and found.computed_from == {}
    assert float(found.vector.norm) == pytest.approx(np.linalg.norm(vector.astype(np.float64)), rel=1e-3)


ROWS = np.eye(LAYERS + 1, WIDTH, dtype=np.float32)
ONES = np.ones(LAYERS, np.float32)
WHOLE = {
    "direction": ROWS[0],
    "directions": ROWS,
    "embeddings": np.float32(1),
    "attention": ONES,
    "mlp": ONES,
}


@pytest.mark.parametrize(
    ("changes", "metadata", "message"),
    [
        ({"direction": None}, {}, "no tensor as its 'direction'"),
        ({"direction": ROWS}, {}, r"\[5, 64\] as its 'direction', but one vector"),
        ({"direction": np.zeros(WIDTH, np.float32)}, {}, "the direction is zero"),
        ({"direction": np.arange(WIDTH)}, {}, "tensor 'direction' is int64"),
        ({"attention": ONES * np.nan}, {}, "'attention' holds NaN"),
        ({"mlp": None, "attention": ONES[:3]}, {}, "mlp is missing; directions .* attention .*3. in place"),
        ({"directions": 2 * ROWS}, {}, "'directions' are not of length 1"),
        ({}, {"keep_norms": "most"}, "keep_norms is 'most'"),
        ({}, {"computed_from": "[1]"}, "computed_from holds a JSON list"),
    ],
)
def test_faults_are_named(
    changes: dict[str, Any], metadata: dict[str, str], message: str, tmp_path: Path
) -> None:
    tensors = {name: np.asarray(x) for name, x in (WHOLE | changes).items() if x is not None}
    save_file(tensors, tmp_path / "d.safetensors", metadata)
    with pytest.raises(CheckpointError, match=message):
        load_direction(tmp_path / "d.safetensors")


def test_a_direction_of_another_shape_is_refused(saved: SavedDirection) -> None:
    for change in ({"num_hidden_layers": 2}, {"hidden_size": 32}):
        model = model_from_config({**CONFIG, **change})
        with pytest.raises(MergelabError, match="is of a model of width 64 and 4 layers, but this one has"):
            saved.for_model(model)
    with pytest.raises(CheckpointError, match="nowhere"):
        load_direction("nowhere.safetensors")
