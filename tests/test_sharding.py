"""Meshes and rules: which axes are split, which stay whole, and what is refused."""

from __future__ import annotations

import jax
import pytest
from jax.sharding import PartitionSpec

from mergelab.errors import MeshError
from mergelab.processes import span_processes, together
from mergelab.sharding import DEFAULT_RULES, make_mesh, named_sharding, partition_spec


def test_a_mesh_uses_every_device_and_fills_in_one_size() -> None:
    assert dict(make_mesh({"data": 2, "tensor": 4}).shape) == {"data": 2, "tensor": 4}
    assert dict(make_mesh({"data": 2, "tensor": -1}).shape) == {"data": 2, "tensor": 4}
    assert dict(make_mesh({"fsdp": 3}, jax.devices()[:3]).shape) == {"fsdp": 3}
    for sizes in ({"data": 3}, {"data": 16}, {}, {"data": 0, "tensor": 8}, {"data": -1, "tensor": -1}):
        with pytest.raises(MeshError, match="over 8 devices"):
            make_mesh(sizes)


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
