"""Loading: every slice on every mesh is the file's, each byte is read once, and faults are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mergelab.checkpoints.folder import open_checkpoint
from mergelab.errors import CheckpointError, MeshError, NonFiniteError
from mergelab.models.layout import whole
from mergelab.models.load import load_params
from mergelab.models.shard_reader import ShardReader
from mergelab.models.table import get_leaf
from mergelab.sharding import DEFAULT_RULES, make_mesh, named_sharding
from tests.models.synthetic import TABLE, Counted, expected, tensors, write

MESHES: dict[str, dict[str, int] | None] = {
    "one device": None,
    "data 8": {"data": 8},
    "fsdp 8": {"fsdp": 8},
    "tensor 8": {"tensor": 8},
    "fsdp 2, tensor 4": {"fsdp": 2, "tensor": 4},
    "data 2, fsdp 2, tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
}
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_leaf_is_the_files_on_every_mesh(name: str, dtype: Any, tmp_path: Path) -> None:
    stored = write(tmp_path, dtype)
    mesh = None if (sizes := MESHES[name]) is None else make_mesh(sizes)
    params = load_params(open_checkpoint(tmp_path).tensors, TABLE, "x", mesh=mesh)
    assert len(jax.tree.leaves(params)) == len(TABLE)
    for leaf in TABLE:
        array, truth = get_leaf(params, leaf), expected(leaf, stored)
        assert array.dtype == dtype
        assert np.asarray(array).tobytes() == truth.tobytes(), leaf
        if mesh is not None:
            assert array.sharding == named_sharding(mesh, leaf.shape, leaf.axes, DEFAULT_RULES)
            for shard in array.addressable_shards:
                assert np.asarray(shard.data).tobytes() == truth[shard.index].tobytes()
    other = {n: a + np.ones((), dtype) for n, a in stored.items()}
    assert np.asarray(get_leaf(params, TABLE[0])).tobytes() != expected(TABLE[0], other).tobytes()


def test_weights_are_split_and_not_just_copied(tmp_path: Path) -> None:
    write(tmp_path)
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    params = load_params(open_checkpoint(tmp_path).tensors, TABLE, "x", mesh=mesh)
    assert {s.data.shape for s in params["experts"].addressable_shards} == {(1, 8, 24)}
    assert {s.data.shape for s in params["neox"]["k"].addressable_shards} == {(12, 4)}
    rules = {**DEFAULT_RULES, "experts": None, "embed": None}
    params = load_params(open_checkpoint(tmp_path).tensors, TABLE, "x", mesh=mesh, rules=rules)
    assert {s.data.shape for s in params["experts"].addressable_shards} == {(4, 16, 6)}
    with pytest.raises(MeshError, match="no entry for the logical axis 'vocab'"):
        load_params(open_checkpoint(tmp_path).tensors, TABLE, "x", mesh=mesh, rules={"embed": None})


@pytest.mark.parametrize("name", MESHES)
def test_one_process_reads_each_byte_once(name: str, tmp_path: Path) -> None:
    stored = write(tmp_path)
    count = [0]
    counted = {n: Counted(s, count) for n, s in open_checkpoint(tmp_path).tensors.items()}
    load_params(counted, TABLE, "x", mesh=None if (sizes := MESHES[name]) is None else make_mesh(sizes))
    # Leaves that share a tensor read it page by page: the file is small, and a page holds it all.
    shared = sum(3 * stored[n].nbytes for n in ("c_attn", "qkv.bias", "qkv.weight"))
    plain = sum(a.nbytes for n, a in stored.items() if n not in ("c_attn", "qkv.bias", "qkv.weight"))
    assert plain < count[0] <= plain + shared


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("transform", ["identity", "transpose"])
def test_half_of_a_leaf_is_half_of_the_reading(axis: int, transform: Any, tmp_path: Path) -> None:
    """What decides the reading of one process among several: rows and columns, straight and transposed."""
    from mergelab.models.table import Leaf

    stored = np.random.default_rng(0).normal(size=(64, 4096)).astype(np.float32)
    stored = stored.T.copy() if transform == "transpose" else stored
    save_file({"w": stored}, tmp_path / "model.safetensors")
    leaf = Leaf(("w",), "w", (64, 4096), transform)
    count = [0]
    box = tuple((n // 2, n) if i == axis else (0, n) for i, n in enumerate(leaf.shape))
    with ShardReader({"w": Counted(open_checkpoint(tmp_path).tensors["w"], count)}) as reader:
        found = reader.start(leaf, [box], np.dtype(np.float32)).wait()[box]
        np.testing.assert_array_equal(found, leaf.forward([stored])[tuple(slice(*r) for r in box)])
        half = leaf.size * 4 // 2
        # Runs that are shorter than a page apart are read as one.
        near = (axis, transform) == (0, "transpose")
        assert half * (2 if near else 1) >= count[0] >= half
        assert near or count[0] == half
        everything = reader.start(leaf, [whole(leaf.shape)], np.dtype(np.float32)).wait()
        assert everything[whole(leaf.shape)].tobytes() == leaf.forward([stored]).tobytes()


def test_loading_casts(tmp_path: Path) -> None:
    stored = write(tmp_path, np.float32)
    source = open_checkpoint(tmp_path).tensors
    for dtype in ("bfloat16", np.float16, ml_dtypes.bfloat16):
        params = load_params(source, TABLE, "x", dtype=dtype, mesh=make_mesh({"fsdp": 2, "tensor": 4}))
        for leaf in TABLE:
            wanted = expected(leaf, stored).astype(dtype)
            assert np.asarray(get_leaf(params, leaf)).tobytes() == wanted.tobytes()
    with pytest.raises(CheckpointError, match="int32"):
        load_params(source, TABLE, "x", dtype=np.int32)


@pytest.mark.parametrize("wide", [np.float32, ml_dtypes.bfloat16], ids=str)
def test_values_that_leave_the_range_are_refused_and_infinities_pass(wide: Any, tmp_path: Path) -> None:
    made = tensors(wide)
    made["down"][3, 4] = 1e6
    save_file(made, tmp_path / "model.safetensors")
    with pytest.raises(NonFiniteError, match="'down' has 1 values beyond the range of float16"):
        load_params(open_checkpoint(tmp_path).tensors, TABLE, "x", dtype=np.float16)
    made["down"][3, 4] = np.inf
    save_file(made, tmp_path / "model.safetensors")
    params = load_params(open_checkpoint(tmp_path).tensors, TABLE, "x", dtype=np.float16)
    assert np.isinf(np.asarray(params["down"])).sum() == 1


def refused(change: Any, folder: Path, **options: Any) -> str:
    made = tensors(np.float32)
    change(made)
    save_file(made, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_params(open_checkpoint(folder).tensors, TABLE, "the/folder", **options)
    return str(caught.value)


def test_tensors_that_do_not_match_the_table_are_refused_by_name(tmp_path: Path) -> None:
    def rename(made: dict[str, np.ndarray]) -> None:
        made["nrm"] = made.pop("norm")

    assert "'nrm'" in (message := refused(rename, tmp_path)) and "did you mean 'norm'" in message
    unused = {"unused": lambda name: name == "nrm"}
    assert "lacks the tensor 'norm'" in refused(rename, tmp_path, **unused)
    assert "'norm' is float32 [3]" in refused(lambda m: m.update(norm=np.zeros(3, np.float32)), tmp_path)
    assert "'norm' is int32 [16]" in refused(lambda m: m.update(norm=np.zeros(16, np.int32)), tmp_path)
    assert "float64" in refused(lambda m: m.update(norm=np.zeros(16)), tmp_path)
    mixed = {"experts.2.w": np.zeros((24, 16), np.float16)}
    assert "'experts' are of different types" in refused(lambda m: m.update(mixed), tmp_path)
    assert "float16, float32" in refused(lambda m: m.update(mixed), tmp_path)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    write(tmp_path)
    source = open_checkpoint(tmp_path).tensors
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match="changed"):
        load_params(source, TABLE, "x")


def test_donating_a_loaded_array_leaves_its_replicas_alone(tmp_path: Path) -> None:
    write(tmp_path)
    params = load_params(open_checkpoint(tmp_path).tensors, TABLE, "x", mesh=make_mesh({"data": 8}))
    before = np.array(params["down"])
    shards = [shard.data for shard in params["down"].addressable_shards]
    doubled = jax.jit(lambda x: x * 2, donate_argnums=0)(shards[0])
    np.testing.assert_array_equal(np.asarray(doubled), before * 2)
    for shard in shards[1:]:
        np.testing.assert_array_equal(np.asarray(shard), before)
