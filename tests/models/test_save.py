"""Saving is the inverse of loading: names, dtypes and bytes, from any mesh, into any number of files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from mergelab.checkpoints.folder import open_checkpoint
from mergelab.checkpoints.output_target import MARKER
from mergelab.errors import CheckpointError, OutputError
from mergelab.models.load import load_params
from mergelab.models.save import save_params
from mergelab.models.table import get_leaf, tree_from_leaves
from mergelab.sharding import make_mesh
from tests.models.synthetic import TABLE, expected, tensors, write

MESHES: list[dict[str, int] | None] = [None, {"tensor": 8}, {"fsdp": 2, "tensor": 4}, {"data": 8}]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=str)
def test_saving_what_was_loaded_gives_the_same_bytes(sizes: Any, dtype: Any, tmp_path: Path) -> None:
    stored = write(tmp_path / "in", dtype)
    mesh = None if sizes is None else make_mesh(sizes)
    params = load_params(open_checkpoint(tmp_path / "in").tensors, TABLE, "x", mesh=mesh)
    out = save_params(params, TABLE, tmp_path / "out", files={"config.json": b"{}"})
    found = load_file(out / "model.safetensors")
    assert found.keys() == stored.keys()
    for name, array in stored.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes(), name
    assert (out / "config.json").read_bytes() == b"{}"
    assert {p.name for p in tmp_path.iterdir()} == {"in", "out"}, "work files are left behind"


def test_large_models_go_into_several_files_with_an_index(tmp_path: Path) -> None:
    stored = write(tmp_path / "in")
    params = load_params(open_checkpoint(tmp_path / "in").tensors, TABLE, "x", mesh=make_mesh({"tensor": 8}))
    out = save_params(params, TABLE, tmp_path / "out", files={}, shard_bytes=4000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    again = open_checkpoint(out)
    assert again.tensors.keys() == stored.keys()
    params = load_params(again.tensors, TABLE, "x")
    for leaf in TABLE:
        assert np.asarray(get_leaf(params, leaf)).tobytes() == expected(leaf, stored).tobytes()


def tree() -> dict[str, Any]:
    stored = tensors(np.float32)
    return tree_from_leaves({leaf: expected(leaf, stored) for leaf in TABLE})


def test_numpy_parameters_are_saved_too(tmp_path: Path) -> None:
    out = save_params(tree(), TABLE, tmp_path / "out", files={})
    found = load_file(out / "model.safetensors")
    assert all(found[name].tobytes() == array.tobytes() for name, array in tensors(np.float32).items())


def test_parameters_that_are_not_the_models_are_refused(tmp_path: Path) -> None:
    def refused(params: dict[str, Any], **files: bytes) -> str:
        with pytest.raises((OutputError, CheckpointError)) as caught:
            save_params(params, TABLE, tmp_path / "out", files=files)
        assert not list(tmp_path.iterdir())
        return str(caught.value)

    missing = tree()
    del missing["attn"]["q"]
    assert "lack 'attn.q'" in refused(missing)
    assert "1 parameters that the model does not have" in refused(tree() | {"extra": np.zeros(3)})
    assert "'norm' has shape (3,)" in refused(tree() | {"norm": np.zeros(3, np.float32)})
    mixed = tree()
    mixed["attn"]["k"] = mixed["attn"]["k"].astype(np.float16)
    assert "'attn.k' is float16, but others that share the tensor 'c_attn' are float32" in refused(mixed)
    assert "would replace the weights" in refused(tree(), **{"model.safetensors": b""})
    assert "not one plain name" in refused(tree(), **{"../config.json": b""})


def test_a_full_folder_is_kept_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("kept")
    with pytest.raises(OutputError, match="not empty"):
        save_params(tree(), TABLE, tmp_path / "out", files={})
    assert (tmp_path / "out" / "precious").read_text() == "kept"
    with pytest.raises(OutputError, match="was not written by mergelab"):
        save_params(tree(), TABLE, tmp_path / "out", files={}, overwrite=True)
    assert (tmp_path / "out" / "precious").read_text() == "kept"
    save_params(tree(), TABLE, tmp_path / "ours", files={"old.txt": b"of an earlier save"})
    save_params(tree(), TABLE, tmp_path / "ours", files={}, overwrite=True)
    assert {p.name for p in (tmp_path / "ours").iterdir()} == {"model.safetensors", MARKER}
