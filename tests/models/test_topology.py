"""Ahead of time: a forward pass compiled for TPU chips that are not there."""

from __future__ import annotations

import importlib.util
import math
import os
from typing import Any

import pytest

from mergelab.aot import ChipReport
from mergelab.errors import DependencyError, MeshError
from mergelab.models import footprint
from mergelab.models.families import model_from_config
from mergelab.models.footprint import compile_forward, smallest_for_pass

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128,
}


@pytest.mark.extra  # tpu-aot
def test_tensor_parallelism_divides_memory_and_adds_reductions() -> None:
    before = dict(os.environ)
    model = model_from_config(CONFIG)
    alone = compile_forward(model, "v5e:2x2", {"data": 4}, batch=4, length=128)
    split = compile_forward(model, "v5e:2x2", {"tensor": 4}, batch=4, length=128)
    assert os.environ == before
    assert (alone.chips, split.chips) == (4, 4)
    parameters = 2 * sum(leaf.size for leaf in model.table())
    assert parameters <= alone.arguments < 1.2 * parameters
    assert parameters / 4 <= split.arguments < 1.2 * parameters / 2
    assert alone.collectives == ()
    # Each block adds two partial sums up: after attention and after the MLP.
    reductions = sum(c.count for c in split.collectives if c.kind in ("all-reduce", "reduce-scatter"))
    assert reductions >= 2 * model.config.n_layers
    assert split.flops > 0 and split.peak > split.arguments


@pytest.mark.extra  # tpu-aot
@pytest.mark.parametrize("topology", ["v5e", "v6e:1x1"])
def test_a_single_chip_has_a_name(topology: str) -> None:
    report = compile_forward(model_from_config(CONFIG), topology, {"data": 1}, batch=1, length=16)
    assert report.chips == 1 and report.collectives == ()


@pytest.mark.extra  # tpu-aot
def test_two_devices_are_on_a_chip_of_the_seventh_generation() -> None:
    report = compile_forward(model_from_config(CONFIG), "v7x:2x2x1", {"tensor": -1}, batch=1, length=16)
    assert report.chips == 8 and report.fits


@pytest.mark.parametrize(
    ("topology", "mesh", "message"),
    [
        ("v5e:2x2", {"data": 3}, "cannot be laid over 4 chips of v5e:2x2: it takes 3"),
        ("v9z:2x2", {"data": 4}, "v9z:2x2"),
        ("v5e:2x2", {"latents": 4}, "the axes here are data, fsdp and tensor"),
    ],
)
def test_meshes_that_a_slice_cannot_have_are_refused(
    topology: str, mesh: dict[str, int], message: str
) -> None:
    with pytest.raises(MeshError, match=message):
        compile_forward(model_from_config(CONFIG), topology, mesh, batch=4, length=8)


def test_parameters_that_no_chip_holds_are_not_compiled_and_the_slice_that_does_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the compiler reports is made up here; tests of the extra ask the compiler."""
    # 17 GB of parameters on each chip, which has 16.
    model = model_from_config(CONFIG | {"vocab_size": 2**19, "hidden_size": 2**13})
    whole = compile_forward(model, "v5e:2x2", {"data": 4}, batch=4, length=8)
    assert not whole.fits and whole.seconds == 0 and whole.arguments > 16 * 2**30
    asked = []

    def compile_for_topology(_: str, topology: str, mesh: dict[str, int], *__: Any, **___: Any) -> ChipReport:
        asked.append(topology)
        devices = math.prod(mesh.values())
        fits = devices > 4
        return ChipReport(devices, "TPU", 0, 0, 0, 12 * 2**30, 1e9, 1e9, (), 0.1, fits=fits)

    monkeypatch.setattr(footprint, "compile_for_topology", compile_for_topology)
    found = smallest_for_pass(model, "v5e:2x2", batch=4, length=8, known=whole)
    assert found is not None and asked == ["v5e:2x2", "v5e:2x4"]
    assert (found.topology, math.prod(found.mesh.values())) == ("v5e:2x4", 8)


def test_without_the_compiler_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r"mergelab\[tpu-aot\]"):
        compile_forward(model_from_config(CONFIG), "v5e:2x2", {"data": 4}, batch=4, length=8)
