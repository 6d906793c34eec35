"""Inventories and footprints agree with what loading does, though they read headers alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from mergelab.checkpoints import dtype_from_name
from mergelab.errors import CheckpointError, MeshError
from mergelab.models.families import model_from_config
from mergelab.models.footprint import footprint, take_inventory
from mergelab.models.model import Model
from mergelab.sharding import make_mesh, named_sharding

CONFIG = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama folder with the names and shapes its config asks for."""
    model = model_from_config(CONFIG)
    tensors = {leaf.hf_name: np.ones(leaf.hf_shape, np.float16) for leaf in model.table()}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_an_inventory_counts_what_is_stored(folder: Path) -> None:
    found = take_inventory(folder)
    stored = safetensors.numpy.load_file(folder / "model.safetensors")
    assert (found.faults, found.parameters) == ((), sum(array.size for array in stored.values()))
    assert found.stored == {"float16": sum(array.nbytes for array in stored.values())}
    assert found.model is not None
    assert {str(found.dtype_of(leaf)) for leaf in found.model.table()} == {"float16"}


def test_no_weights_are_read(folder: Path) -> None:
    # The header's claims stand; the weights behind it are holes.
    file = folder / "model.safetensors"
    head = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    before, size = take_inventory(folder), file.stat().st_size
    with file.open("r+b") as stream:
        stream.truncate(head)
        stream.truncate(size)
    assert take_inventory(folder).parameters == before.parameters


def test_weights_and_config_that_disagree_are_named(folder: Path) -> None:
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors.pop("model.norm.weight")
    tensors |= {
        "model.layers.0.mlp.up_proj.weight": np.ones((24, 15), np.float16),
        "model.layers.9.odd": np.ones(3, np.float16),
    }
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    assert sorted(take_inventory(folder).faults) == [
        "config.json leaves no use for the tensor 'model.layers.9.odd'.",
        "the tensor 'model.layers.0.mlp.up_proj.weight' is [24, 15], but config.json asks for [24, 16].",
        "the tensor 'model.norm.weight' is missing.",
    ]


def test_an_unknown_family_still_has_an_inventory_of_tensors(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | {"model_type": "lama"}))
    found = take_inventory(folder)
    assert found.model is None and found.parameters
    assert "model_type 'lama' (did you mean 'llama'?)" in found.faults[0]
    (folder / "config.json").unlink()
    assert "no config.json" in take_inventory(folder).faults[0]
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError):
        take_inventory(folder)


@pytest.mark.parametrize("sizes", [{"tensor": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8}])
def test_the_footprint_is_what_each_device_holds(sizes: dict[str, int]) -> None:
    model = model_from_config(CONFIG)
    mesh = make_mesh(sizes)
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in model.table():
        array = np.ones(leaf.shape, np.float32)
        placed = jax.device_put(array, named_sharding(mesh, leaf.shape, leaf.axes))
        for shard in placed.addressable_shards:
            held[shard.device] += shard.data.nbytes
    found = footprint(model, sizes, lambda leaf: np.dtype(np.float32))
    assert set(held.values()) == {found.parameters}
    assert found.total == 4 * sum(leaf.size for leaf in model.table())
    assert found.parameters < found.total or sizes == {"data": 8}


def test_the_footprint_counts_the_cache_and_the_dtype() -> None:
    model = model_from_config(CONFIG)
    half = footprint(model, {"tensor": 2}, lambda leaf: dtype_from_name("bfloat16"), batch=3, cache_length=10)
    whole = footprint(model, {"tensor": 2}, lambda leaf: np.dtype(np.float32))
    assert 2 * half.parameters == whole.parameters
    cache = model.new_cache(3, 10, np.float32)
    assert half.cache == sum(array.nbytes for array in (*cache.keys, *cache.values)) // 2 // 2
    assert whole.cache == 0
    alone = footprint(model, {"data": 1}, lambda leaf: np.dtype(np.float32))
    assert alone.parameters == alone.whole == alone.total


@pytest.mark.parametrize("sizes", [{}, {"tensor": 0}])
def test_meshes_without_devices_are_refused(sizes: dict[str, int]) -> None:
    model: Model = model_from_config(CONFIG)
    with pytest.raises(MeshError, match="has no devices"):
        footprint(model, sizes, lambda leaf: np.dtype(np.float32))
