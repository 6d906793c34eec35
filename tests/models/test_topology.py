"""Ahead of time: a forward pass compiled for TPU chips that are not there."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest

from mergelab.errors import DependencyError, MeshError
from mergelab.models.families import model_from_config
from mergelab.models.footprint import compile_forward

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
@pytest.mark.parametrize(
    ("topology", "mesh", "changes", "message"),
    [
        ("v5e:2x2", {"data": 3}, {}, "cannot be laid over its 4 chips"),
        ("v9z:2x2", {"data": 4}, {}, "v9z:2x2: "),
        # 17 GB of parameters on each chip, which has 16.
        ("v5e:2x2", {"data": 4}, {"vocab_size": 2**19, "hidden_size": 2**13}, "(?i)exhausted|memory|hbm"),
    ],
)
def test_what_does_not_fit_is_an_error_with_the_compilers_reason(
    topology: str, mesh: dict[str, int], changes: dict[str, Any], message: str
) -> None:
    model = model_from_config(CONFIG | changes)
    with pytest.raises(MeshError, match=message):
        compile_forward(model, topology, mesh, batch=4, length=8)


def test_without_the_compiler_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r"mergelab\[tpu-aot\]"):
        compile_forward(model_from_config(CONFIG), "v5e:2x2", {"data": 4}, batch=4, length=8)
