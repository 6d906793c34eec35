"""Meshes and rules: which axes are split, which stay whole, and what is refused."""

from __future__ import annotations

from collections import namedtuple

import jax
import pytest
from jax.sharding import PartitionSpec

from mergelab.errors import MeshError
from mergelab.processes import span_processes, together
from mergelab.sharding import (
    DEFAULT_RULES,
    MODEL_AXES,
    _first_devices,
    fill_sizes,
    idle_devices,
    make_mesh,
    named_sharding,
    partition_spec,
    read_sizes,
)


def test_a_mesh_fills_in_one_size_and_takes_the_first_devices_where_it_is_smaller() -> None:
    assert dict(make_mesh({"data": 2, "tensor": 4}).shape) == {"data": 2, "tensor": 4}
    assert dict(make_mesh({"data": 2, "tensor": -1}).shape) == {"data": 2, "tensor": 4}
    assert dict(make_mesh({"fsdp": 3}, jax.devices()[:3]).shape) == {"fsdp": 3}
    small = make_mesh({"data": 3})
    assert list(small.devices) == jax.devices()[:3]
    assert idle_devices(small) == "the mesh data=3 uses 3 of 8 devices; data=-1 would use all."
    assert idle_devices(make_mesh({"data": -1})) is None
    wrong = (
        {"data": 3, "tensor": -1},
        {"data": 16},
        {},
        {"data": 0, "tensor": 8},
        {"data": -1, "tensor": -1},
    )
    for sizes in wrong:
        with pytest.raises(MeshError, match="over 8 devices"):
            make_mesh(sizes)


def test_every_fault_of_a_mesh_is_named_at_once() -> None:
    with pytest.raises(MeshError) as raised:
        make_mesh({"model": 8, "tensr": 0}, axes=MODEL_AXES)
    model, tensr, size = raised.value.faults
    assert "'model'" in model and "the axes here are data, fsdp and tensor" in model
    assert "did you mean 'tensor'" in tensr and "'tensr' is 0" in size
    with pytest.raises(MeshError, match="it takes 4; choose sizes whose product is 8"):
        fill_sizes({"data": 4}, 8, all_of_them=True)
    with pytest.raises(MeshError, match=r"'b=x' is not axis=size; 'c' is not axis=size; a has -2 devices"):
        read_sizes("b=x,c,a=-2")


def test_several_processes_give_equally_many_devices() -> None:
    device = namedtuple("device", ("id", "process_index"))
    devices = [device(n, n // 4) for n in range(8)]
    assert [d.id for d in _first_devices(devices, 4, {"data": 4})] == [0, 1, 4, 5]
    with pytest.raises(MeshError, match="3 of the 8 devices of 2 processes"):
        _first_devices(devices, 3, {"data": 3})


def test_rules_map_logical_axes_to_mesh_axes() -> None:
    assert partition_spec(("embed", "heads")) == PartitionSpec("fsdp", "tensor")
    assert partition_spec(("batch", "length", None)) == PartitionSpec(("data", "fsdp"), None, None)
    assert partition_spec(("experts", "embed", "mlp")) == PartitionSpec("tensor", "fsdp", None)
    assert partition_spec(("mlp",), {"mlp": ("fsdp", "tensor")}) == PartitionSpec(("fsdp", "tensor"))
    with pytest.raises(MeshError, match=r"'head'.*did you mean 'heads'"):
        partition_spec(("head",))


def test_what_a_mesh_lacks_or_does_not_divide_stays_whole() -> None:
    mesh = make_mesh({"tensor": 8})
    assert named_sharding(mesh, (64, 32), ("embed", "heads")).spec == PartitionSpec(None, "tensor")
    assert named_sharding(mesh, (64, 12), ("embed", "heads")).spec == PartitionSpec(None, None)
    assert named_sharding(mesh, (50257, 64), ("vocab", "embed")).spec == PartitionSpec(None, None)
    # Experts that cannot be shared out leave the mesh axis to the neurons.
    assert named_sharding(mesh, (6, 64, 32), ("experts", "embed", "mlp")).spec == PartitionSpec(
        None, None, "tensor"
    )
    assert named_sharding(mesh, (3,), ()).spec == PartitionSpec()
    with pytest.raises(MeshError, match="'wide'"):
        named_sharding(mesh, (8,), ("wide",), DEFAULT_RULES)


def test_a_step_of_one_process_runs_alone() -> None:
    assert not span_processes(jax.devices())
    with pytest.raises(KeyError), together("a step", distributed=False):
        raise KeyError("x")
    with together("a step", distributed=True):
        pass
    with pytest.raises(KeyError), together("a step", distributed=True):
        raise KeyError("x")
