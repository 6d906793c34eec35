"""A training's data says which model and site it comes from, where it can."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergelab.activations.model_activations import ModelActivations
from mergelab.activations.store import write_store
from mergelab.checkpoints.folder import weights_sha256
from mergelab.errors import CheckpointError
from mergelab.sae.training.config import DataSection
from mergelab.sae.training.data import host_metadata, portable_data, store_facts
from tests.models.tiny_models import tiny, write

SITE = "blocks.0.resid_post"


def test_a_store_and_its_model_say_the_same(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", "bert")
    wanted = {"site": SITE, "model": "model", "model_hash": weights_sha256(folder), "context": 8}
    direct = DataSection(kind="model", model=str(folder), site=SITE, text="text.txt", context=8)
    assert host_metadata(direct) == wanted
    longer = direct.model_copy(update={"context": 64 + 1})
    assert host_metadata(longer) == wanted | {"context": 64}  # all the positions there are
    model, params = tiny("bert")
    tokens = np.random.default_rng(0).integers(3, 61, (4, 8)).astype(np.int32)
    write_store(ModelActivations(model, params, tokens, (SITE, "embed")), tmp_path / "acts", model=folder)
    stored = DataSection(kind="files", path=str(tmp_path / "acts" / f"{SITE}-*.safetensors"))
    assert host_metadata(stored) == wanted
    mixed = DataSection(kind="files", path=str(tmp_path / "acts" / "*-00000.safetensors"))
    with pytest.raises(
        CheckpointError, match=r"holds the activations of several sites \(blocks.0.resid_post"
    ):
        host_metadata(mixed)


@pytest.mark.parametrize(
    "wrong", [{"sites": 1}, {"sites": None}, {"model": []}, {"model_sha256": None}, {"format": "other"}]
)
def test_a_damaged_description_is_named(tmp_path: Path, wrong: dict[str, Any]) -> None:
    facts = {"format": "mergelab-activations-1", "sites": {"embed": 4}, "model": "m", "model_sha256": "0"}
    (tmp_path / "embed-00000.safetensors").touch()
    (tmp_path / "store.json").write_text(json.dumps({**facts, **wrong}))
    if "format" in wrong:  # of another program, which means something else by that name
        assert store_facts(str(tmp_path / "embed-*.safetensors")) == {}
        return
    with pytest.raises(CheckpointError, match=r"store\.json does not map sites to widths"):
        store_facts(str(tmp_path / "embed-*.safetensors"))


def test_what_cannot_be_known_is_not_made_up(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.zeros((4, 3), np.float32))
    assert host_metadata(DataSection(kind="files", path=str(tmp_path / "rows.npy"))) == {}
    assert host_metadata(DataSection(kind="toy")) == {}
    with pytest.raises(CheckpointError, match="no weight files"):
        host_metadata(DataSection(kind="model", model=str(tmp_path), site=SITE, text="text.txt"))


def test_what_an_sae_says_of_its_data_holds_no_places_of_this_machine(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", "bert")
    said = {"kind": "model", "model": str(folder), "text": [str(tmp_path / "a.txt"), "b/c.txt"]}
    assert portable_data(said) == {"kind": "model", "model": "model", "text": ["a.txt", "b/c.txt"]}
    stored = {"kind": "files", "path": f"{tmp_path}/acts/*.npy", "target_path": "memory://bucket/*.npy"}
    assert portable_data(stored) == stored | {"path": "*.npy"}
